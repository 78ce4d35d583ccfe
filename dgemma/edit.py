"""Edit: parts of a text written anew, the rest pinned; or all of it, from a noised copy or to an instruction."""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from dgemma.decoding import blocks
from dgemma.decoding.events import Finished
from dgemma.decoding.pins import Known
from dgemma.infill import context_of
from dgemma.text.output import ENDS

if TYPE_CHECKING:
    from dgemma.language_model import LanguageModel, Prompt

CONTEXT = 3
"""Unchanged lines that a diff shows on either side."""


@dataclass(frozen=True)
class Edit:
    """A text before and after.

    blocks: steps and convergence of each canvas from the first changed one on; spans: where the selected parts lie in
    the new text, as character offsets; cut: max_new_tokens ended the answer to an instruction.
    """

    text: str
    before: str
    blocks: list[tuple[int, bool]]
    spans: list[tuple[int, int]]
    cut: bool
    seconds: float

    def diff(self, name: str = "text") -> str:
        """The change as a unified diff; empty if there is none."""
        old, new = (_lines(text) for text in (self.before, self.text))
        lines = difflib.unified_diff(old, new, f"a/{name}", f"b/{name}", n=CONTEXT)
        return "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines)


def edit(
    lm: "LanguageModel",
    text: str,
    spans: Sequence[tuple[int, int]] | None = None,
    instruction: str | None = None,
    noise: float = 1.0,
    *,
    prompt: "Prompt | None" = None,
    seed: int = 0,
    **options: Any,
) -> Edit:
    """See `LanguageModel.edit`."""
    started = perf_counter()
    if not text:
        raise ValueError("the text to edit is empty")
    if instruction is not None:
        if prompt is not None:
            raise ValueError("give an instruction or a prompt, not both: the instruction becomes the prompt")
        if lm.template is None:
            raise ValueError(f"{lm.name} has no chat template: it takes no instruction")
        body = text.rstrip("\n")
        prompt = [{"role": "user", "content": f"{instruction}\n\n{body}"}]
        if spans is None:
            return _answer(lm, text, body, prompt, noise, seed, options, started)
    elif spans is None and noise >= 1:
        raise ValueError("nothing of the text would be left: give spans, an instruction, or noise below 1")
    if "max_new_tokens" in options:
        raise ValueError("max_new_tokens has no effect: an edit keeps the number of tokens")
    pieces = list(_pieces(text, [(0, len(text))] if spans is None else spans))

    tokens: list[int] = []
    ranges = []
    for piece, free in pieces:
        start = len(tokens)
        tokens += lm.tokenizer.encode(lm.tokenizer.plain(piece))
        if free:
            ranges.append(range(start, len(tokens)))
    tokens += _end(lm, prompt)
    canvas = lm.model.config.canvas_length
    first = ranges[0].start // canvas * canvas
    last = (ranges[-1].stop // canvas + 1) * canvas  # with a pin behind the last free token: no end token stands there
    window = tokens[first:last]
    unknown = {place - first for places in ranges for place in places}
    known = Known(
        {place: token for place, token in enumerate(window) if place not in unknown}, window if noise < 1 else (), noise
    )
    request = blocks.Request(
        torch.tensor([*context_of(lm, prompt), *tokens[:first]]),
        lm.defaults.with_options(**options, max_new_tokens=len(unknown)),
        lm.noise(seed),
        known,
    )
    *_, done = blocks.generate(lm.model, [request])
    assert isinstance(done, Finished)

    written = [lm.tokenizer.decode(done.tokens[r.start - first : r.stop - first], skip_special=True) for r in ranges]
    new, places, fills = "", [], iter(written)
    for piece, free in pieces:
        start, new = len(new), new + (next(fills) if free else piece)
        if free:
            places.append((start, len(new)))
    canvases = list(zip(done.steps, done.converged, strict=True))
    return Edit(new, text, canvases, places, False, perf_counter() - started)


def _answer(
    lm: "LanguageModel",
    text: str,
    body: str,
    prompt: "Prompt",
    noise: float,
    seed: int,
    options: dict[str, Any],
    started: float,
) -> Edit:
    """The whole text, as the answer to a prompt: it may become longer or shorter."""
    draft = lm.tokenizer.encode(lm.tokenizer.plain(body))
    options = {"max_new_tokens": max(lm.defaults.max_new_tokens, 2 * len(draft)), **options}
    answer = lm.generate(prompt, seed=seed, draft=draft if noise < 1 else (), noise_level=noise, **options)
    new = answer.text + text[len(body) :]
    canvases = list(zip(answer.steps, answer.converged, strict=True))
    return Edit(new, text, canvases, [(0, len(new))], answer.finish_reason == "length", perf_counter() - started)


def _pieces(text: str, spans: Sequence[tuple[int, int]]) -> Iterator[tuple[str, bool]]:
    """The text in pieces that are selected or not. Each is tokenised by itself, so no token reaches across."""
    if not spans:
        raise ValueError("there are no spans to edit")
    at = 0
    for start, stop in sorted(spans):
        if not 0 <= start < stop <= len(text):
            raise ValueError(f"the span {start}:{stop} is not one of 0:{len(text)} with at least one character")
        if start < at:
            raise ValueError(f"the span {start}:{stop} overlaps the one before, which ends at {at}")
        if at < start:
            yield text[at:start], False
        yield text[start:stop], True
        at = stop
    if at < len(text):
        yield text[at:], False


def _end(lm: "LanguageModel", prompt: "Prompt | None") -> list[int]:
    """The token that ends a text: of a turn behind a prompt, else of a document; none if the model writes none."""
    names = ENDS if prompt is not None else reversed(ENDS[:2])
    known = [lm.tokenizer.id(name) for name in names]
    possible = [i for i in lm.defaults.eos_token_id if i < lm.model.config.vocab_size]
    return ([i for i in known if i in possible] or possible)[:1]


def _lines(text: str) -> list[str]:
    """Lines with their ends; only a line feed ends one."""
    lines = [f"{line}\n" for line in text.split("\n")]
    return [*lines[:-1], *([lines[-1][:-1]] if lines[-1] != "\n" else [])]
