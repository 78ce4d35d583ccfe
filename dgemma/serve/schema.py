"""Request bodies. Names, ranges and what is refused stand here, and from here in /openapi.json.

A field that could not be honoured is refused by name; one that OpenAI's clients send without meaning anything by it is
taken at the value that has no effect.
"""

from dataclasses import fields
from functools import partial
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, WithJsonSchema, model_validator

from dgemma.config import GenerationConfig, MediaConfig
from dgemma.constraints.tools import tool_calls
from dgemma.serve.body import Body, Objects, Text, text
from dgemma.serve.structure import NamedTool, Pins, ResponseFormat, Structure, StructuredOutputs, Tokens, ToolChoice

_HELP = {f.name: f.metadata["help"] for f in fields(GenerationConfig) if "help" in f.metadata}


def _option(name: str, least: float) -> Any:
    return Field(None, ge=least, description=f"{_HELP[name]}; the checkpoint's own if absent")


def _only(*values: Any) -> Any:
    """A field that is accepted where it has no effect."""

    def check(value: Any) -> Any:
        if value not in (None, *values):
            raise ValueError(f"not supported; only {' or '.join(map(repr, values))}, which has no effect, is accepted")
        return value

    return Annotated[Any, AfterValidator(check), WithJsonSchema({"enum": [None, *values]})]


def _not_yet(value: Any) -> Any:
    if value is not None:
        raise ValueError("not supported yet")
    return value


Prompts = Annotated[str | list[str] | list[int] | list[list[int]], AfterValidator(text)]
NotYet = Annotated[Any, AfterValidator(_not_yet), WithJsonSchema({"type": "null"})]
Stop = Annotated[str, Field(min_length=1, max_length=256)]


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: _only(False) = None  # type: ignore[valid-type]


class VllmXargs(Body):
    """vLLM's names of diffusion's parameters."""

    diffusion_max_steps: int | None = _option("max_denoising_steps", 1)
    diffusion_seed_canvas: Tokens | None = Field(None, description="tokens that the answer begins from: see draft_text")
    diffusion_pinned: Pins | None = Field(None, description="the same as pins")
    diffusion_canvas_length: NotYet = None
    diffusion_read_only: NotYet = None
    diffusion_constrained: NotYet = None


class Generate(Body):
    """What both endpoints take."""

    model: str = "default"
    max_tokens: int | None = _option("max_new_tokens", 1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = Field(None, description="strings that end it")
    seed: int | None = Field(None, ge=0, le=(1 << 64) - 1, description="of all draws; a random one if absent")
    temperature: float | None = Field(None, ge=0, le=2, description="a factor of t_min and t_max; 0 is greedy")
    n: int = Field(1, ge=1, le=8, description="answers; the i-th has the seed + i")
    user: str | None = Field(None, description="accepted for other servers' clients")

    max_denoising_steps: int | None = _option("max_denoising_steps", 1)
    entropy_bound: float | None = _option("entropy_bound", 0)
    t_min: float | None = _option("t_min", 0)
    t_max: float | None = _option("t_max", 0)
    stability_threshold: int | None = _option("stability_threshold", 0)
    confidence_threshold: float | None = _option("confidence_threshold", 0)
    autoregressive: bool = Field(False, description="left to right; temperature is then the sampling's, 0 if absent")
    structured_outputs: StructuredOutputs | None = None
    pins: Pins | None = Field(None, description="tokens by position in the answer, thoughts and all, that stay there")
    draft_text: Text | None = Field(None, min_length=1, description="what the answer begins from instead of noise")
    noise_level: float | None = Field(
        None, gt=0, le=1, description="share of the draft that is noise all the same, and of the steps; 0.5 if absent"
    )
    vllm_xargs: VllmXargs | None = None

    presence_penalty: _only(0) = None  # type: ignore[valid-type]
    frequency_penalty: _only(0) = None  # type: ignore[valid-type]
    repetition_penalty: _only(1) = None  # type: ignore[valid-type]
    logit_bias: _only({}) = None  # type: ignore[valid-type]
    top_p: _only(1) = None  # type: ignore[valid-type]
    top_k: _only(0, -1) = None  # type: ignore[valid-type]
    min_p: _only(0) = None  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.stream_options and not self.stream:
            raise ValueError("stream_options needs stream: true")
        if self.max_denoising_steps and self.vllm_xargs and self.vllm_xargs.diffusion_max_steps:
            raise ValueError("max_denoising_steps and vllm_xargs.diffusion_max_steps are the same: give one")
        if self.pins is not None and self.vllm_xargs and self.vllm_xargs.diffusion_pinned is not None:
            raise ValueError("pins and vllm_xargs.diffusion_pinned are the same: give one")
        if self.draft_text and self.seed_canvas:
            raise ValueError("draft_text and vllm_xargs.diffusion_seed_canvas are the same: give one")
        if self.noise_level is not None and not (self.draft_text or self.seed_canvas):
            raise ValueError("noise_level needs draft_text or vllm_xargs.diffusion_seed_canvas")
        if self.temperature not in (None, 0, 1) and (self.t_min is not None or self.t_max is not None):
            raise ValueError("temperature scales t_min and t_max: give one or the others")
        if self.autoregressive and (given := [*self.diffusion, *self.known]):
            raise ValueError(f"{given[0]} has no effect with autoregressive")
        if self.autoregressive and self.n != 1:
            raise ValueError("n must be 1 with autoregressive")
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def diffusion(self) -> dict[str, Any]:
        """Options of denoising that were given, by GenerationConfig's names."""
        given = {name: getattr(self, name) for name in _HELP if getattr(self, name, None) is not None}
        if self.vllm_xargs and self.vllm_xargs.diffusion_max_steps:
            given["max_denoising_steps"] = self.vllm_xargs.diffusion_max_steps
        return given

    @property
    def seed_canvas(self) -> list[int] | None:
        return self.vllm_xargs.diffusion_seed_canvas if self.vllm_xargs else None

    @property
    def pinned(self) -> dict[int, int]:
        return self.pins or (self.vllm_xargs and self.vllm_xargs.diffusion_pinned) or {}

    @property
    def known(self) -> list[str]:
        """Fields given that say something of the answer."""
        drafts = {"draft_text": self.draft_text, "vllm_xargs.diffusion_seed_canvas": self.seed_canvas}
        own = "vllm_xargs.diffusion_pinned" if self.pins is None else "pins"
        given = {own: self.pinned, **drafts}
        return [*(name for name, value in given.items() if value), *(each.field for each in self.structures)]

    @property
    def structures(self) -> list[Structure]:
        """What the answer must match; more than one cannot be."""
        made = self.structured_outputs and self.structured_outputs.structure
        return [made] if made else []

    @property
    def think(self) -> bool:
        return False

    @property
    def candidates(self) -> int:
        """Answers that are made of each prompt."""
        return self.n

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens

    def options(self, defaults: GenerationConfig) -> GenerationConfig:
        """How to decode. Raises ValueError if the options contradict each other."""
        changes = self.diffusion
        if self.most_tokens is not None:
            changes["max_new_tokens"] = self.most_tokens
        if self.temperature == 0:
            changes["greedy"] = True
        elif self.temperature not in (None, 1) and not self.autoregressive:
            changes |= {name: getattr(defaults, name) * self.temperature for name in ("t_min", "t_max")}
        return defaults.with_options(**changes)


class TemplateOptions(Body):
    enable_thinking: bool = False


_MEDIA = {f.name: f.metadata["help"] for f in fields(MediaConfig)}


class MediaOptions(Body):
    """How the images and videos of the messages are taken in; the model's own way if absent."""

    image_tokens: int | None = Field(None, ge=1, description=_MEDIA["image_tokens"])
    frame_tokens: int | None = Field(None, ge=1, description=_MEDIA["frame_tokens"])
    video_frames: int | None = Field(None, ge=0, description=_MEDIA["video_frames"])


class ChatRequest(Generate):
    messages: Objects = Field(min_length=1)
    max_completion_tokens: int | None = _option("max_new_tokens", 1)
    tools: Objects | None = None
    tool_choice: ToolChoice | None = Field(None, description="auto if absent")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    chat_template_kwargs: TemplateOptions | None = None
    response_format: ResponseFormat | None = None
    media: MediaOptions | None = None
    draft: bool = Field(False, description="also send each step, in chunks with an empty choices and a key dgemma")
    parallel_tool_calls: bool | None = Field(
        None, description="of a tool_choice that forces calls: true allows several, else there is one"
    )
    store: _only(False) = None  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _agree_in_chat(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.draft and not (self.stream and self.n == 1):
            raise ValueError("draft needs stream: true and n: 1")
        if self.max_tokens and self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens are the same: give one")
        if self.forced and not self.tools:
            raise ValueError("tool_choice needs tools")
        if self.named is not None and self.named not in self.tool_names:
            raise ValueError(f"tool_choice names {self.named!r}, which is not among the tools")
        if self.parallel_tool_calls is False and not self.forced:
            raise ValueError("parallel_tool_calls can be false only where tool_choice forces a call")
        if len(given := [each.field for each in self.structures]) > 1:
            raise ValueError(f"{given[0]} and {given[1]} bind the same answer: give one")
        return self

    @property
    def most_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def think(self) -> bool:
        return bool(self.chat_template_kwargs and self.chat_template_kwargs.enable_thinking)

    @property
    def forced(self) -> bool:
        """Whether the answer is a call."""
        return self.tool_choice == "required" or self.named is not None

    @property
    def named(self) -> str | None:
        """The tool that is to be called."""
        return self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None

    @property
    def tool_names(self) -> list[Any]:
        functions = [tool.get("function") for tool in self.tools or []]
        return [function.get("name") for function in functions if isinstance(function, dict)]

    @property
    def structures(self) -> list[Structure]:
        found = super().structures
        if self.response_format and (made := self.response_format.structure):
            found.append(made)
        if self.forced and self.tools:
            make = partial(tool_calls, self.tools, self.named, many=bool(self.parallel_tool_calls))
            found.append(Structure("tool_choice", make))
        return found

    @property
    def media_options(self) -> dict[str, int]:
        return self.media.model_dump(exclude_none=True) if self.media else {}

    @property
    def offered(self) -> list[dict[str, Any]] | None:
        """Tools that the model is told of."""
        return None if self.tool_choice == "none" else self.tools or None


class CompletionRequest(Generate):
    prompt: Prompts
    echo: _only(False) = None  # type: ignore[valid-type]
    suffix: Text | None = Field(
        None,
        description="what follows the text that is asked for, of max_tokens tokens at most; none if empty. In a text "
        "on either side special tokens are characters then, and the n answers are of different lengths, best first",
    )
    logprobs: NotYet = None
    best_of: int | None = Field(
        None, ge=1, le=8, description="answers to make, of which the n likeliest a token, left to right, are returned"
    )

    @model_validator(mode="after")
    def _agree_in_completions(self) -> Self:
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError("best_of must be at least n")
        if self.best_of and self.best_of > self.n and (self.stream or self.autoregressive):
            raise ValueError("best_of is not for stream or autoregressive")
        if self.autoregressive and len(self.prompts) > 1:
            raise ValueError("prompt must be a single one with autoregressive")
        if self.suffix:
            plain = ("stop", "best_of", "autoregressive")
            if given := [*(name for name in plain if getattr(self, name)), *self.known]:
                raise ValueError(f"{given[0]} has no meaning between a prompt and a suffix")
            if len(self.prompts) != 1 or self.prompts[0] == []:
                raise ValueError("prompt must be a single one with suffix, and token ids at least one")
        return self

    @property
    def candidates(self) -> int:
        return self.best_of or self.n

    @property
    def prompts(self) -> list[str | list[int]]:
        return as_list(self.prompt)


def as_list(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """The prompts of a field that may be one or several."""
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return [prompt]
    return list(prompt)  # type: ignore[arg-type]


class TokenizeRequest(Body):
    """A text as /v1/completions reads it, or messages as /v1/chat/completions does."""

    model: str = "default"
    prompt: Annotated[str, AfterValidator(text)] | None = None
    messages: Objects | None = Field(None, min_length=1)
    tools: Objects | None = None
    chat_template_kwargs: TemplateOptions | None = None
    add_special_tokens: bool = Field(True, description="begin a prompt with bos")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt or messages must be given, and not both")
        return self


class DetokenizeRequest(Body):
    model: str = "default"
    tokens: list[Annotated[int, Field(ge=0, lt=1 << 31)]]
