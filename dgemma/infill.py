"""Infill: what belongs between a prefix and a suffix. Gaps of several lengths are tried as rows of one batch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from dgemma.config import GAP_MARKER, GAP_TOKENS, GenerationConfig
from dgemma.decoding import blocks
from dgemma.decoding.pins import Known
from dgemma.model.cache import Cache
from dgemma.model.network import DiffusionGemma
from dgemma.picture import Prompted
from dgemma.scoring import log_probabilities
from dgemma.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from dgemma.language_model import LanguageModel, Message, Prompt

SHARE = 2
"""A suffix that is too long keeps one position in so many of its canvas; no gap is longer than the rest."""


@dataclass(frozen=True)
class Candidate:
    """What fills a gap of `length` tokens; log_probability: of gap and suffix, at most a canvas of it, in nats, left to
    right; steps: denoising steps it took."""

    text: str
    tokens: list[int]
    length: int
    log_probability: float
    steps: int
    converged: bool


@dataclass(frozen=True)
class Row:
    """A canvas with a gap of `length` tokens from position `start` on; its request's prompt is all that lies before."""

    request: blocks.Request
    start: int
    length: int

    @property
    def tokens(self) -> list[int]:
        """What the gap holds, once the request is done."""
        return self.request.tokens[self.start :][: self.length]


@dataclass(frozen=True)
class Layout:
    """A text with a gap, laid out as rows of one batch.

    context: tokens that each row's prompt begins with; before: all tokens before the gap, and after: those behind it
    that judge every candidate, whether or not its canvas has room for them.
    """

    rows: list[Row]
    context: list[int]
    before: list[int]
    after: list[int]
    repeated: bool

    @property
    def judged(self) -> list[list[int]]:
        """What is to be scored behind `before`, once all rows are done."""
        return [[*row.tokens, *self.after] for row in self.rows]

    def ranked(self, tokenizer: Tokenizer, scores: Sequence[float]) -> list[Candidate]:
        """Best first, by the log-probability of each row of `judged`."""
        found = []
        for row, score in zip(self.rows, scores, strict=True):
            tokens, done = row.tokens, row.request
            text = tokenizer.decode(tokens, skip_special=True)
            found.append(Candidate(text, tokens, len(tokens), score, sum(done.steps), all(done.converged)))
        return sorted(found, key=lambda candidate: -candidate.log_probability)


@dataclass(frozen=True)
class Infill:
    """The middle, and the candidates it was chosen from, best first.

    repeated: the canvas had no room for the whole suffix, so that the prompt told it.
    """

    text: str
    candidates: list[Candidate]
    repeated: bool
    seconds: float


def infill(
    lm: "LanguageModel",
    prefix: str,
    suffix: str,
    max_tokens: int = GAP_TOKENS,
    *,
    prompt: "Prompt | None" = None,
    lengths: Sequence[int] | None = None,
    seed: int = 0,
    think: bool = False,
    **options: Any,
) -> Infill:
    """See `LanguageModel.infill`."""
    started = perf_counter()
    if "max_new_tokens" in options:
        raise ValueError("infill takes max_tokens, or lengths, in place of max_new_tokens")
    before, after = (lm.tokenizer.encode(lm.tokenizer.plain(text)) for text in (prefix, suffix))
    gaps = gap_lengths(max_tokens, lengths, len(after), lm.model.config.canvas_length)
    layout = lay_out(lm, before, after, gaps, lm.defaults.with_options(**options), seed, prompt, think)

    cache = _encoded(lm.model, layout.context, layout.before)
    for row in layout.rows:
        row.request.prompt = row.request.prompt[-1:]  # the cache has the rest
    shared = cache.select([0 if row.start else 1 for row in layout.rows])
    for _ in blocks.generate(lm.model, [row.request for row in layout.rows], shared):
        pass
    values = log_probabilities(lm.model, cache.select([1]), layout.before[-1], layout.judged)
    candidates = layout.ranked(lm.tokenizer, list(map(sum, values)))
    return Infill(candidates[0].text, candidates, layout.repeated, perf_counter() - started)


def lay_out(
    lm: "LanguageModel",
    before: Sequence[int],
    after: Sequence[int],
    gaps: Sequence[int],
    config: GenerationConfig,
    seed: int,
    prompt: "Prompt | None" = None,
    think: bool = False,
) -> Layout:
    """A row for each length of the gap between two texts' tokens; prompt and think as for `LanguageModel.infill`."""
    canvas = lm.model.config.canvas_length
    repeated = bool(after) and len(after) > canvas - max(gaps)
    context = _told(lm, prompt, before, after, think) if repeated else context_of(lm, prompt, think)
    outside = len(before) // canvas * canvas
    context, inside = [*context, *before[:outside]], before[outside:]
    whole = [*context, *inside]
    rows = []
    for gap in gaps:
        kept = inside if not after or len(inside) + gap + len(after) <= canvas else []
        pins = dict(enumerate(kept)) | dict(enumerate(after[: canvas - gap], len(kept) + gap))
        begin = torch.tensor(context if kept else whole, dtype=torch.int64)
        request = blocks.Request(begin, replace(config, max_new_tokens=gap), lm.noise(seed), Known(pins))
        rows.append(Row(request, len(kept), gap))
    return Layout(rows, context, whole, list(after[:canvas]), repeated)


def gap_lengths(max_tokens: int, lengths: Sequence[int] | None, suffix: int, canvas: int) -> list[int]:
    """The lengths to try, ascending: those asked for, else about 1, 2, 4 … up to max_tokens, as far as they fit.

    suffix: its tokens, 0 for a continuation, which is cut by max_tokens alone. ValueError for a length that cannot be.
    """
    room = canvas - min(suffix, -(-canvas // SHARE))
    for what, values in (("max_tokens", [max_tokens]), ("a length", lengths or [])):
        if any(value < 1 for value in values):
            raise ValueError(f"{what} must be at least 1, not {min(values)}")
    if lengths is not None:
        if not lengths:
            raise ValueError("there are no lengths to try")
        if suffix and max(lengths) > room:
            raise ValueError(
                f"a gap of {max(lengths)} tokens leaves the suffix too little of the canvas: at most {room}"
            )
        return sorted(set(lengths))
    if not suffix:
        return [max_tokens]
    longest = min(max_tokens, room)
    return sorted({round(longest ** (i / 7)) for i in range(8)})


@torch.inference_mode()
def _encoded(model: DiffusionGemma, context: Sequence[int], whole: Sequence[int]) -> Cache:
    """Two rows that lack only their last tokens: the context, and the whole that continues it."""
    cache = model.new_cache()
    model.encode([torch.tensor(context[:-1], dtype=torch.int64)], cache)
    cache = cache.fork([0, 0])
    rest = torch.tensor(whole[len(context) - 1 : -1], dtype=torch.int64)
    model.encode([rest[:0], rest], cache)
    return cache


def context_of(lm: "LanguageModel", prompt: "Prompt | None", think: bool = False) -> list[int]:
    """The tokens before a text: a prompt as the model reads it, or a bos token for a text of its own."""
    return [lm.model.config.bos_token_id] if prompt is None else lm.tokens(prompt, think=think)


def _told(
    lm: "LanguageModel", prompt: "Prompt | None", before: Sequence[int], after: Sequence[int], think: bool
) -> list[int]:
    """A context that holds the whole text: in a user's message, or as it is where there can be none."""
    text = GAP_MARKER.join(lm.tokenizer.decode(tokens) for tokens in (before, after))
    messages = _messages(lm, prompt)
    if messages is None:
        return [*context_of(lm, prompt, think), *lm.tokenizer.encode(lm.tokenizer.plain(f"{text}\n\n"))]
    asked = f"Write this text in full, with what belongs in the place of {GAP_MARKER}:\n\n{text}"
    if messages and messages[-1]["role"] == "user" and isinstance(messages[-1]["content"], str):
        asked = f"{messages.pop()['content']}\n\n{asked}"  # templates refuse two turns of a user in a row
    return lm.tokens([*messages, {"role": "user", "content": asked}], think=think)


def _messages(lm: "LanguageModel", prompt: "Prompt | None") -> "list[Message] | None":
    """A prompt as messages; None if it is tokens, or if the model has no template for any."""
    if lm.template is None:
        return None
    if prompt is None:
        return []
    if isinstance(prompt, Prompted):
        return None
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    messages = [item for item in prompt if not isinstance(item, int)]
    return messages if len(messages) == len(prompt) else None
