"""Request bodies. Names, ranges and what is refused stand here, and from here in /openapi.json.

A field that could not be honoured is refused by name; one that OpenAI's clients send without meaning anything by it is
taken at the value that has no effect.
"""

import json
from dataclasses import fields
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from dgemma.config import GenerationConfig

T = TypeVar("T")
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


def _choice(value: Any) -> Any:
    if value not in ("auto", "none", None):
        raise ValueError("not supported yet; it is 'auto' or 'none'")
    return value


def _format(value: dict[str, Any]) -> dict[str, Any]:
    if value != {"type": "text"}:
        raise ValueError(f"{value.get('type')!r} is not supported yet; only {{'type': 'text'}} is")
    return value


def _text(value: T) -> T:
    """Whatever holds texts; JSON can spell halves of surrogate pairs, which are none."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("it holds half of a surrogate pair, which is not text") from None
    return value


Objects = Annotated[list[dict[str, Any]], AfterValidator(_text)]
NotYet = Annotated[Any, AfterValidator(_not_yet), WithJsonSchema({"type": "null"})]
Stop = Annotated[str, Field(min_length=1, max_length=256)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: _only(False) = None  # type: ignore[valid-type]


class VllmXargs(Body):
    """vLLM's names of diffusion's parameters."""

    diffusion_max_steps: int | None = _option("max_denoising_steps", 1)
    diffusion_seed_canvas: NotYet = None
    diffusion_pinned: NotYet = None
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
        if self.temperature not in (None, 0, 1) and (self.t_min is not None or self.t_max is not None):
            raise ValueError("temperature scales t_min and t_max: give one or the others")
        if self.autoregressive and (given := self.diffusion):
            raise ValueError(f"{next(iter(given))} has no effect with autoregressive")
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


class ChatRequest(Generate):
    messages: Objects = Field(min_length=1)
    max_completion_tokens: int | None = _option("max_new_tokens", 1)
    tools: Objects | None = None
    tool_choice: Annotated[Literal["auto", "none"] | None, BeforeValidator(_choice)] = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    chat_template_kwargs: TemplateOptions | None = None
    response_format: Annotated[dict[str, Any], AfterValidator(_format)] | None = None
    draft: bool = Field(False, description="also send each step, in chunks with an empty choices and a key dgemma")
    parallel_tool_calls: _only(True) = None  # type: ignore[valid-type]
    store: _only(False) = None  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _agree_in_chat(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.draft and not (self.stream and self.n == 1):
            raise ValueError("draft needs stream: true and n: 1")
        if self.max_tokens and self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens are the same: give one")
        return self

    @property
    def most_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def think(self) -> bool:
        return bool(self.chat_template_kwargs and self.chat_template_kwargs.enable_thinking)

    @property
    def offered(self) -> list[dict[str, Any]] | None:
        """Tools that the model is told of."""
        return None if self.tool_choice == "none" else self.tools or None


class CompletionRequest(Generate):
    prompt: Annotated[str | list[str] | list[int] | list[list[int]], AfterValidator(_text)]
    echo: _only(False) = None  # type: ignore[valid-type]
    suffix: NotYet = None
    logprobs: NotYet = None
    best_of: _only(1) = None  # type: ignore[valid-type]

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]
        return list(self.prompt)  # type: ignore[arg-type]


class TokenizeRequest(Body):
    """A text as /v1/completions reads it, or messages as /v1/chat/completions does."""

    model: str = "default"
    prompt: Annotated[str, AfterValidator(_text)] | None = None
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
