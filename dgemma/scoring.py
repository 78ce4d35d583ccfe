"""Judging texts that are given: choices at marked places of a canvas, and any text left to right."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dgemma.decoding.blocks import Request, check_room
from dgemma.decoding.denoise import Canvas, denoise_step
from dgemma.decoding.pins import Known
from dgemma.model.cache import Cache
from dgemma.model.network import CHUNK, DiffusionGemma

if TYPE_CHECKING:
    from dgemma.language_model import LanguageModel, Prompt

PLACE = "<choice>"
"""Where a template's choices go."""
ROWS = 16
"""Canvases that are denoised together."""
LOGITS = 1024
"""Tokens whose logits are held at once."""


@dataclass(frozen=True)
class Question:
    """What is asked, and an answer to it, with PLACE where one of the choices belongs: everywhere the same one."""

    prompt: "Prompt"
    template: str
    choices: Sequence[str]


@dataclass(frozen=True)
class Scores:
    """The probability of each choice among all of them, and the `mass` that all had before they were made to sum to 1.

    Before, a choice's probability is the product of those of its tokens, each at its own position and by itself. The
    canvas is laid out for each length of choices, so that the mass is at most 1 if all are equally long, and otherwise
    at most the number of lengths.
    """

    choices: list[str]
    probabilities: list[float]
    mass: float

    @property
    def best(self) -> str:
        return self.choices[self.probabilities.index(max(self.probabilities))]


@dataclass(frozen=True)
class Row:
    """A canvas: what is known of it, the positions left free, and the tokens that each choice has in all of them."""

    question: int
    request: Request
    free: list[int]
    choices: dict[int, list[int]]


def prepare(
    lm: "LanguageModel",
    questions: Sequence[Question],
    steps: int = 1,
    seed: int = 0,
    think: bool = False,
    **options: Any,
) -> list[Row]:
    """The canvases that questions need, question by question. ValueError for what cannot be asked."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    canvas = lm.model.config.canvas_length
    config, noise = (
        lm.defaults.with_options(**options, max_denoising_steps=steps, max_new_tokens=canvas),
        lm.noise(seed),
    )
    rows = []
    for number, question in enumerate(questions):
        prompt = torch.tensor(lm.tokens(question.prompt, think=think), dtype=torch.int64)
        if not len(prompt):
            raise ValueError("the prompt is empty; give at least one token")
        choices = _choices(lm, question.choices)
        for length in sorted({len(tokens) for tokens in choices}):
            pins, free = _laid_out(lm, question.template, length, canvas)
            request = Request(prompt, config, noise, Known(pins))
            check_room(lm.model, request, 0)
            places = len(free) // length
            fitting = {i: tokens * places for i, tokens in enumerate(choices) if len(tokens) == length}
            rows.append(Row(number, request, free, fitting))
    return rows


@torch.inference_mode()
def passes(model: DiffusionGemma, questions: Sequence[Question], rows: Sequence[Row]) -> Iterator[list[Scores]]:
    """The scores of prepared questions, in their order; after each pass of the network, those that it completed.

    Nothing is committed: a cache of the prompts, each encoded once, is all that is left of it, and goes with it.
    """
    prompts = {tuple(row.request.prompt.tolist()): row.request.prompt for row in rows}
    where = {prompt: i for i, prompt in enumerate(prompts)}
    cache = model.new_cache(len(prompts))
    for at in range(0, max(map(len, prompts)), CHUNK):
        model.encode([prompt[at : at + CHUNK] for prompt in prompts.values()], cache)
        yield []
    logs: list[dict[int, Tensor]] = [{} for _ in questions]
    told = 0
    for start in range(0, len(rows), ROWS):
        some = rows[start : start + ROWS]
        prefix = cache.select([where[tuple(row.request.prompt.tolist())] for row in some])
        requests = [row.request for row in some]
        canvases = [Canvas.begin(model, b, 0, r.options, r.noise, r.known) for b, r in enumerate(requests)]
        for _ in range(requests[0].options.max_denoising_steps - 1):
            denoise_step(model, prefix, canvases)
            yield []
        tokens, soft = torch.stack([c.tokens for c in canvases]), torch.stack([c.soft for c in canvases])
        for row, states in zip(some, model.denoise_states(tokens, prefix, soft), strict=True):
            logs[row.question] |= _read(model, row, states)
        ready = told
        while ready < len(questions) and len(logs[ready]) == len(questions[ready].choices):
            ready += 1
        yield [_scores(questions[i], logs[i]) for i in range(told, ready)]
        told = ready


def _choices(lm: "LanguageModel", choices: Sequence[str]) -> list[list[int]]:
    if not choices:
        raise ValueError("choices: there is nothing to choose from")
    if len(set(choices)) < len(choices):
        raise ValueError("choices: one of them stands there twice")
    tokens = [lm.tokenizer.encode(choice) for choice in choices]
    if not all(tokens):
        raise ValueError("choices: one of them is empty")
    return tokens


def _laid_out(lm: "LanguageModel", template: str, length: int, canvas: int) -> tuple[dict[int, int], list[int]]:
    """The template's tokens by position, and the positions between them, `length` at each place."""
    first, *others = map(lm.tokenizer.encode, template.split(PLACE))
    if not others:
        raise ValueError(f"template: {PLACE} must stand where the choices go")
    tokens: list[int | None] = [*first]
    for part in others:
        tokens += [*[None] * length, *part]
    if len(tokens) > canvas:
        raise ValueError(
            f"template: with choices of {length} tokens it has {len(tokens)}, and a canvas holds {canvas}: "
            "move its beginning to the prompt"
        )
    pins = {place: token for place, token in enumerate(tokens) if token is not None}
    return pins, [place for place, token in enumerate(tokens) if token is None]


def _read(model: DiffusionGemma, row: Row, states: Tensor) -> dict[int, Tensor]:
    """The log-probability of each choice, float64, from a canvas's final states [C, hidden]."""
    logs = model.embed_tokens.logits(states[row.free]).cpu().double().log_softmax(-1)
    return {i: logs[torch.arange(len(tokens)), tokens].sum() for i, tokens in row.choices.items()}


def _scores(question: Question, logs: dict[int, Tensor]) -> Scores:
    values = torch.stack([logs[i] for i in range(len(question.choices))])
    return Scores(list(question.choices), values.softmax(-1).tolist(), float(values.logsumexp(-1).exp()))


@torch.inference_mode()
def left_to_right(
    model: DiffusionGemma, cache: Cache, last: int, rows: Sequence[Sequence[int]]
) -> Iterator[list[list[float]]]:
    """Log-probabilities in nats of several continuations' tokens by the causal mode: those of each row, pass by pass.

    They continue the cache's only row, which stays as it is, and `last`, the token behind it.
    """
    cache = cache.fork([0] * len(rows))
    size = max(1, LOGITS // len(rows))
    for at in range(0, max(map(len, rows)), size):
        told = [torch.tensor([last, *row][at : min(at + size, len(row))], dtype=torch.int64) for row in rows]
        logits = model.encode(told, cache, logits=True)
        assert logits is not None
        parts = zip(logits, (torch.tensor(row[at : at + size], dtype=torch.int64) for row in rows), strict=True)
        yield [part.log_softmax(-1)[torch.arange(len(said)), said].tolist() for part, said in parts]


def log_probabilities(
    model: DiffusionGemma, cache: Cache, last: int, rows: Sequence[Sequence[int]]
) -> list[list[float]]:
    """All of `left_to_right`: a value for each token of each row."""
    found: list[list[float]] = [[] for _ in rows]
    for parts in left_to_right(model, cache, last, rows):
        for row, part in zip(found, parts, strict=True):
            row += part
    return found
