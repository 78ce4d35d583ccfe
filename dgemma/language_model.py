"""LanguageModel: a network, its tokenizer and its defaults, from text to text."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from dgemma import candidates, embedded, scoring
from dgemma.checkpoints.adapters import load_adapter
from dgemma.checkpoints.gguf import read_gguf
from dgemma.checkpoints.load import load_gguf, load_model
from dgemma.checkpoints.source import GGUF, defaults_of, folders_of, holder, resolve
from dgemma.config import GAP_TOKENS, GenerationConfig, MediaConfig
from dgemma.constraints.compile import Constraint, compiled
from dgemma.decoding import autoregressive as left_to_right
from dgemma.decoding import blocks
from dgemma.decoding.constraint import TokenAutomaton
from dgemma.decoding.events import Event, Finished
from dgemma.decoding.noise import Noise
from dgemma.decoding.pins import Known
from dgemma.edit import Edit, edit
from dgemma.infill import Infill, infill
from dgemma.media.prompt import media_of, opened, prompted, quiet, shows
from dgemma.media.sources import Sources
from dgemma.memory import keep_freed_memory
from dgemma.model.cache import Cache
from dgemma.model.kv_formats import page_format
from dgemma.model.lora import merge_lora
from dgemma.model.network import DiffusionGemma
from dgemma.picture import Prompted
from dgemma.quant.modules import matrices
from dgemma.quant.quantize import Quantization
from dgemma.text import ggml_tokenizer
from dgemma.text.chat import ChatTemplate
from dgemma.text.output import ToolCall, parse_tokens
from dgemma.text.tokenizer import Tokenizer

Message = dict[str, Any]
Prompt = str | Sequence[Message] | Sequence[int] | Prompted
"""A user's text, chat messages, or token ids that are taken as they are; or what `LanguageModel.read` made of them."""


@dataclass(frozen=True)
class Generation:
    """An answer and how it came about.

    text: the answer without thoughts and calls, which are in `reasoning` and `tool_calls`; tokens: all that was
    generated, the end token included; finish_reason: "stop" or "length"; steps and converged: one entry a block;
    tokens_per_forward: tokens a denoising step; seconds: {"prefill", "denoise", "commit"}. With `best_of`,
    log_probability: a token's mean, in nats, left to right; candidates: all answers, best first.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    steps: list[int]
    converged: list[bool]
    tokens_per_forward: float
    prompt_tokens: int
    seed: int
    seconds: dict[str, float]
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    log_probability: float | None = None
    candidates: list["Generation"] = field(default_factory=list)


@dataclass(frozen=True)
class LanguageModel:
    """What `dgemma.load` returns."""

    name: str
    model: DiffusionGemma
    tokenizer: Tokenizer
    template: ChatTemplate | None
    defaults: GenerationConfig
    task: embedded.Task | None = None

    def generate(self, prompt: Prompt, *, seed: int = 0, best_of: int = 1, **options: Any) -> Generation:
        """Answers a prompt; takes what `stream` takes.

        best_of: answers of so many seeds, from `seed` on, are made in one batch, and the one is returned that the
        causal mode finds the likeliest a token; not with `noise` or `autoregressive`.
        """
        if best_of != 1:
            return candidates.best_of(self, prompt, best_of, seed, **options)
        *_, last = self.stream(prompt, seed=seed, **options)
        assert isinstance(last, Finished)
        return self.result(last, seed)

    def stream(
        self,
        prompt: Prompt,
        *,
        seed: int = 0,
        think: bool = False,
        tools: Sequence[dict[str, Any]] | None = None,
        noise: Sequence[Noise] | None = None,
        cache: Cache | None = None,
        autoregressive: bool = False,
        temperature: float = 0.0,
        constraint: Constraint | None = None,
        pins: Mapping[int, int] | None = None,
        draft: str | Sequence[int] = (),
        noise_level: float = 1.0,
        media: Mapping[str, int] | None = None,
        **options: Any,
    ) -> Iterator[Event]:
        """The events of one answer as they happen, from Prefilled to Finished.

        think, tools: for the chat template. noise: a list of one Noise that replaces the seeded draws. cache: an
        encoded prefix of one row that the prompt continues; it stays as it is. autoregressive: the same weights left
        to right, at `temperature`. options: fields of GenerationConfig, over the checkpoint's own; a wrong one is a
        ValueError that names it.

        Messages may hold images and videos (`dgemma.media.sources.payload` says how), best before the text that is
        about them; media: fields of MediaConfig for them.

        constraint: what the answer must match, whatever the model believes: a JSON schema (a dictionary), a regular
        expression (a string), a list of choices, or `dgemma.grammar(...)`. pins: tokens by their position in the
        answer, which stay as they are; they cost nothing of max_new_tokens. draft: text or tokens that the canvas
        begins with instead of noise, of which the share `noise_level`, above 0, is noise all the same.
        """
        request = self.request(
            prompt,
            seed=seed,
            think=think,
            tools=tools,
            constraint=constraint,
            pins=pins,
            draft=draft,
            noise_level=noise_level,
            media=media,
            **options,
        )
        if noise:
            request.noise = noise[0]
        if autoregressive:
            return left_to_right.generate(self.model, request, cache, temperature)
        if temperature:
            raise ValueError("temperature is for the autoregressive mode; diffusion has t_min and t_max")
        return blocks.generate(self.model, [request], cache)

    def request(
        self,
        prompt: Prompt,
        *,
        seed: int = 0,
        think: bool = False,
        tools: Sequence[dict[str, Any]] | None = None,
        constraint: Constraint | None = None,
        pins: Mapping[int, int] | None = None,
        draft: str | Sequence[int] = (),
        noise_level: float = 1.0,
        media: Mapping[str, int] | None = None,
        **options: Any,
    ) -> blocks.Request:
        """What `stream` is asked for, as a row of a batch."""
        read = self.read(prompt, think=think, tools=tools, media=media)
        tokens = torch.tensor(read.tokens, dtype=torch.int64)
        config = self.defaults.with_options(**options)
        drafted = tuple(self.tokenizer.encode(draft) if isinstance(draft, str) else draft)
        automaton = None if constraint is None else self.automaton(constraint, config, think)
        known = Known(pins or {}, drafted, noise_level, automaton)
        return blocks.Request(tokens, config, self.noise(seed), known, read.pictures)

    def infill(
        self,
        prefix: str,
        suffix: str,
        max_tokens: int = GAP_TOKENS,
        *,
        prompt: Prompt | None = None,
        lengths: Sequence[int] | None = None,
        seed: int = 0,
        think: bool = False,
        **options: Any,
    ) -> Infill:
        """What belongs between a prefix and a suffix; with an empty suffix, what follows the prefix.

        Gaps of up to eight lengths, about geometric up to max_tokens, or those of `lengths`, are filled as rows of one
        batch and ranked by the log-probability of gap and suffix left to right (the sum, not the mean a token: it found
        the right length more often; a model whose causal mode is untrained needs the length told). Prefix and suffix
        are tokenised each by itself, and special tokens in them are ordinary characters; in the text of the gap special
        tokens are left out.

        prompt: makes the whole a part of the model's reply to it; without one the text stands behind a bos token.
        think, options: as for `stream`. What of the prefix begins a canvas (behind whole canvases of it) is pinned
        there if gap and suffix fit too, since models are trained so; for longer gaps all of it is encoded. A
        suffix must lie in the gap's canvas: of one that does not fit, the head is pinned, in at least half of the
        canvas, and the whole text with a marker is told in a user's message, or before the prefix where there can be
        no message (`Infill.repeated`). ValueError for a length that leaves the suffix less.
        """
        return infill(
            self, prefix, suffix, max_tokens, prompt=prompt, lengths=lengths, seed=seed, think=think, **options
        )

    def edit(
        self,
        text: str,
        spans: Sequence[tuple[int, int]] | None = None,
        instruction: str | None = None,
        noise: float = 1.0,
        *,
        prompt: Prompt | None = None,
        seed: int = 0,
        **options: Any,
    ) -> Edit:
        """Parts of a text, or all of it, written anew.

        spans: the parts, as pairs of character offsets. Everything else is pinned and comes back to the last byte; a
        part keeps its number of tokens, since a canvas has no room to move (`infill` tries lengths). noise: below 1,
        the parts start from what is there, of which that share is noise. Without spans all of the text does, and
        noise must be below 1. prompt: what the text is the model's reply to; without one it stands behind a bos token.

        instruction: a user's message with the text, for models with a chat template. With spans only those change;
        without, the answer replaces the text, and may be longer or shorter (max_new_tokens: at least twice the text).

        Of a text longer than a canvas, the canvases before the first changed one are encoded as they are, and those
        behind the last one cost nothing. options: as for `stream`.
        """
        return edit(self, text, spans, instruction, noise, prompt=prompt, seed=seed, **options)

    def automaton(self, constraint: Constraint, config: GenerationConfig, think: bool = False) -> TokenAutomaton:
        """What keeps an answer to a constraint; ValueError says what in it cannot be kept to."""
        ends, pad = config.eos_token_id, config.pad_token_id
        return compiled(constraint, self.tokenizer, self.model.config.vocab_size, ends, pad, think)

    def noise(self, seed: int) -> Noise:
        """The draws that a seed stands for."""
        return Noise(seed, self.model.config.vocab_size, self.model.config.canvas_length)

    def tokens(
        self, prompt: Prompt, *, think: bool = False, tools: Sequence[dict[str, Any]] | None = None
    ) -> list[int]:
        """A prompt of text as the model reads it; ValueError for one with images or video (see `read`)."""
        read = self.read(prompt, think=think, tools=tools)
        if read.pictures:
            raise ValueError("messages: images and video are not taken here; only text is")
        return read.tokens

    def read(
        self,
        prompt: Prompt,
        *,
        think: bool = False,
        tools: Sequence[dict[str, Any]] | None = None,
        media: Mapping[str, int] | None = None,
        sources: Sources | None = None,
    ) -> Prompted:
        """A prompt as the model reads it. Without a chat template, text is taken as it is, behind a bos token.

        media: fields of MediaConfig; sources: what may be read for images and videos, files if not told.
        """
        if isinstance(prompt, Prompted):
            if media:
                raise ValueError(f"{next(iter(media))} has no effect: the prompt has been read already")
            return prompt
        if isinstance(prompt, str) or not shows(prompt):
            if media:
                raise ValueError(f"{next(iter(media))} has no effect: there is no image or video in the prompt")
            return Prompted(self._text_tokens(prompt, think, tools))
        messages = self.opened(cast(Sequence[Message], prompt), media, sources)
        return self._prompted(messages, think=think, tools=tools)

    def opened(
        self, messages: Sequence[Message], media: Mapping[str, int] | None = None, sources: Sources | None = None
    ) -> list[Message]:
        """Messages with what their images and videos show in the places of paths, URLs and bytes; see `read`."""
        config = self.model.config
        return opened(messages, config, MediaConfig.of(config, **(media or {})), sources or Sources())

    def _prompted(self, messages: Sequence[Message], **chat: Any) -> Prompted:
        """Opened messages as the model reads them; chat: as for `render`."""
        text = self.render(quiet(messages, self.tokenizer, self.model.config), **chat)
        return prompted(text, media_of(messages), self.tokenizer, self.model.config)

    def _text_tokens(self, prompt: Any, think: bool, tools: Sequence[dict[str, Any]] | None) -> list[int]:
        if not isinstance(prompt, str) and all(isinstance(item, int) for item in prompt):
            ids = cast(list[int], list(prompt))
            unknown = [i for i in ids if not 0 <= i < self.model.config.vocab_size]
            if unknown:
                raise ValueError(f"token id {unknown[0]} is not in 0 … {self.model.config.vocab_size - 1}")
            return ids
        if isinstance(prompt, str) and self.template is None:
            return [self.model.config.bos_token_id, *self.tokenizer.encode(prompt)]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return self.tokenizer.encode(self.render(cast(Sequence[Message], messages), think=think, tools=tools))

    def render(self, messages: Sequence[Message], think: bool = False, tools: Any = None, reply: bool = True) -> str:
        """Chat messages in the checkpoint's template; `reply` adds the header of the model's turn."""
        if self.template is None:
            raise ValueError(f"{self.name} has no chat template: give text or token ids instead of messages")
        if self.task:
            messages = [self._prepared(message) for message in messages]
        # What users and tools write cannot open or end a turn: special tokens in it stay ordinary characters.
        return self.template.render(
            messages, tools, enable_thinking=think, add_generation_prompt=reply, plain=self.tokenizer.plain
        )

    def _prepared(self, message: Message) -> Message:
        assert self.task
        return {**message, "content": self.task.prepare(message["content"])} if message["role"] == "user" else message

    def result(self, finished: Finished, seed: int = 0) -> Generation:
        """The answer that a stream ended with."""
        output = parse_tokens(finished.tokens, self.tokenizer)
        return Generation(
            text=output.content,
            tokens=finished.tokens,
            finish_reason="tool_calls" if output.tool_calls else finished.reason,
            steps=finished.steps,
            converged=finished.converged,
            tokens_per_forward=finished.tokens_per_forward,
            prompt_tokens=finished.prompt_tokens,
            seed=seed,
            seconds={
                "prefill": finished.prefill_seconds,
                "denoise": finished.denoise_seconds,
                "commit": finished.commit_seconds,
            },
            reasoning=output.reasoning,
            tool_calls=output.tool_calls,
        )

    def score(
        self,
        prompt: Prompt,
        template: str,
        choices: Sequence[str],
        steps: int = 1,
        *,
        seed: int = 0,
        think: bool = False,
        **options: Any,
    ) -> scoring.Scores:
        """How probable each of some texts is at the places of an answer that `<choice>` marks in its template.

        The template's text is pinned in a canvas, its places are as long as the choice, in tokens, and everything
        behind it is noise. After `steps` denoising steps the last one's logits, at temperature 1, are read; nothing is
        committed. Template and choices are encoded apart: if a blank parts them, the tokenizer may have it with the
        choice. Options: fields of GenerationConfig for the steps before the last.
        """
        question = scoring.Question(prompt, template, choices)
        return self.score_all([question], steps, seed=seed, think=think, **options)[0]

    def score_all(
        self,
        questions: Sequence[scoring.Question],
        steps: int = 1,
        *,
        seed: int = 0,
        think: bool = False,
        **options: Any,
    ) -> list[scoring.Scores]:
        """`score` for many prompts and templates in shared batches; each as if it were alone."""
        rows = scoring.prepare(self, questions, steps, seed, think, **options)
        return [scores for found in scoring.passes(self.model, questions, rows) for scores in found] if rows else []

    @torch.inference_mode()
    def log_probabilities(self, prompt: Prompt, continuation: str | Sequence[int]) -> list[float]:
        """Log-probability in nats of each token of a continuation, left to right, by the causal mode."""
        read = self.read(prompt)
        before = read.tokens
        after = self.tokenizer.encode(continuation) if isinstance(continuation, str) else list(continuation)
        if not after:
            raise ValueError("the continuation is empty: there is nothing to score")
        cache = self.model.new_cache()
        self.model.encode([torch.tensor(before[:-1], dtype=torch.int64)], cache, pictures=[read.pictures])
        return scoring.log_probabilities(self.model, cache, before[-1], [after])[0]

    def chat(self, **options: Any) -> "Chat":
        """A conversation whose prefix stays in the cache from turn to turn; options as for `stream`."""
        return Chat(self, options)


class Chat:
    """Several turns with one model: what was encoded for earlier turns is not encoded again."""

    def __init__(self, lm: LanguageModel, options: dict[str, Any]):
        self.lm, self.options = lm, options
        self.messages: list[Message] = []
        self.reset()

    def reset(self) -> None:
        """Forgets all turns but a system message."""
        self.messages = [m for m in self.messages if m["role"] == "system"]
        self._encoded = Prompted([])
        self._cache = self.lm.model.new_cache()

    def send(self, content: str | Sequence[Mapping[str, Any]], **options: Any) -> Iterator[Event]:
        """The events of the answer to one more user message: a text, or parts of text, images and video.

        The turn counts once it is complete; if the caller stops early or something fails, the conversation stays as
        it was.
        """
        options = {**self.options, **options}
        chat = {name: options.pop(name, None) for name in ("think", "tools")}
        messages, media = [*self.messages, {"role": "user", "content": content}], options.pop("media", None)
        if shows(messages):
            messages = self.lm.opened(messages, media)
        settled, whole = (self._read(messages, reply=reply, **chat) for reply in (False, True))
        if whole.part(0, len(settled.tokens)).tokens != settled.tokens:
            settled = Prompted([])
        self._encode(settled)
        for event in self.lm.stream(whole.part(len(settled.tokens)), cache=self._cache, **options):
            if isinstance(event, Finished):
                answer = self.lm.result(event).text
                self.messages = [*messages, {"role": "assistant", "content": answer}]
            yield event

    def _read(self, messages: Sequence[Message], **chat: Any) -> Prompted:
        if shows(messages):
            return self.lm._prompted(messages, **chat)
        return Prompted(self.lm.tokenizer.encode(self.lm.render(messages, **chat)))

    @torch.inference_mode()
    def _encode(self, wanted: Prompted) -> None:
        """Brings the cache to these tokens: from what it holds if they continue it, else from nothing."""
        encoded, cache = self._encoded, self._cache
        if not wanted.begins_with(encoded):
            encoded, cache = Prompted([]), self.lm.model.new_cache()
        rest = wanted.part(len(encoded.tokens))
        # Until it is through, nothing counts: an encode that is interrupted leaves a cache of unknown length.
        self._encoded, self._cache = Prompted([]), self.lm.model.new_cache()
        self.lm.model.encode([torch.tensor(rest.tokens, dtype=torch.int64)], cache, pictures=[rest.pictures])
        self._encoded, self._cache = wanted, cache


def load(
    source: str | Path,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str | Quantization | None = None,
    kv_cache: str | None = None,
) -> LanguageModel:
    """A model from a hub id, a directory in the released format, a GGUF file, or the name of an embedded model.

    A directory, or hub id, of a LoRA adapter gives its base model with the adapter merged into it, or beside it where
    that is quantised; tokenizer and chat template are the adapter's where it brings its own, or the GGUF file's.
    device: "auto" takes a CUDA device if there is one; dtype: "auto" is the file's own, or "float32", "bfloat16",
    "float16". quantize: "int8", "fp8", "int4", "w4a8", "nvfp4" or a Quantization keeps attention, dense MLPs and
    experts of a file that is not quantised in fewer bits. kv_cache: "int8" or "fp8" keeps keys and values of encoded
    tokens in 8 bits; None in the model's dtype. On a CPU, malloc is told to keep freed memory.
    Errors name, in one line, the file, tensor or value and say what to do.
    """
    pages = page_format(kv_cache)
    folders = folders_of(resolve(source))
    read = _load_gguf if folders[-1].suffix == GGUF else _load_directory
    lm = read(str(source), folders, device, dtype, quantize)
    for adapter in folders[:-1]:
        load_adapter(lm.model, adapter)
        if not matrices(lm.model):
            merge_lora(lm.model)
    lm.model.requires_grad_(False)
    lm.model.page_format = pages
    if lm.model.device.type == "cpu":
        keep_freed_memory()
    return lm


def _load_directory(
    name: str, folders: Sequence[Path], device: str, dtype: str, quantize: str | Quantization | None
) -> LanguageModel:
    return LanguageModel(
        name=name,
        model=load_model(folders[-1], device, dtype, quantize),
        tokenizer=Tokenizer.from_directory(holder(folders, "tokenizer.json")),
        template=ChatTemplate.from_directory(holder(folders, "chat_template.jinja")),
        defaults=defaults_of(folders),
        task=embedded.task(folders[0]),
    )


def _load_gguf(
    name: str, folders: Sequence[Path], device: str, dtype: str, quantize: str | Quantization | None
) -> LanguageModel:
    path = folders[-1]
    if quantize:
        raise ValueError(f"{path}: quantize has no effect on a GGUF file, which is taken as it is")
    gguf = read_gguf(path)
    try:
        names = ggml_tokenizer.names(gguf.keys)
        tokenizer = Tokenizer(ggml_tokenizer.backend(gguf.keys), names)
        template = gguf.keys.get("tokenizer.chat_template")
        chat = ChatTemplate(template, names) if template else None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return LanguageModel(name, load_gguf(gguf, device, dtype), tokenizer, chat, gguf.generation)
