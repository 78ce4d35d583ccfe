"""How well a model does a task: many items answered in batches, and what their checks come to."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist, fmean
from typing import Any, Protocol

import torch

from dgemma.decoding import blocks
from dgemma.decoding.events import Finished
from dgemma.decoding.pins import UNKNOWN, Known
from dgemma.evals.tasks import Answer, Item, Score, constraint
from dgemma.language_model import Generation, LanguageModel
from dgemma.picture import Prompted

ALL = "all"
"""The level of a summary's last row."""


class Checker(Protocol):
    """The part of a task that measuring needs."""

    def check(self, item: Item, answer: Answer) -> Score: ...


@dataclass(frozen=True)
class Result:
    """An item, the answer to it, and what the check says; `steps` of all blocks, `converged` if each of them was."""

    item: Item
    answer: Generation
    score: Score

    @property
    def level(self) -> str:
        return self.item.level

    @property
    def text(self) -> str:
        return self.answer.text

    @property
    def finish_reason(self) -> str:
        return self.answer.finish_reason

    @property
    def tokens_per_forward(self) -> float:
        return self.answer.tokens_per_forward

    @property
    def steps(self) -> int:
        return sum(self.answer.steps)

    @property
    def converged(self) -> bool:
        return all(self.answer.converged)


@dataclass(frozen=True)
class Share:
    """A share of items with its 95 % interval."""

    share: float
    low: float
    high: float

    @classmethod
    def of(cls, hits: Iterable[bool]) -> "Share":
        hits = list(hits)
        return cls(sum(hits) / len(hits), *wilson(sum(hits), len(hits)))


@dataclass(frozen=True)
class Row:
    """What the items of a level, or all, come to: shares, means over the answers, tokens over all steps."""

    level: str
    count: int
    exact: Share
    valid: Share
    parts: dict[str, float]
    steps: float
    tokens_per_forward: float
    converged: float


def measure(
    lm: LanguageModel,
    items: Sequence[Item],
    task: Checker,
    batch: int = 32,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
    constrain: bool = False,
    **options: Any,
) -> list[Result]:
    """A result for each item, in order. Item i has the noise of seed + i, so the batch size changes speed only.

    constrain: answers keep to the task's `constraint`. progress: told the number of answers so far. options: fields of
    GenerationConfig, over the checkpoint's own.
    """
    config = lm.defaults.with_options(**options)
    results: dict[int, Result] = {}
    for start in range(0, len(items), batch):
        requests = []
        for row, item in enumerate(items[start : start + batch]):
            asked = constraint(task, item) if constrain else None
            known = Known(constraint=lm.automaton(asked, config, item.think)) if asked is not None else UNKNOWN
            read, noise = read_question(lm, item), lm.noise(seed + start + row)
            requests.append(blocks.Request(torch.tensor(read.tokens), config, noise, known, read.pictures))
        for event in blocks.generate(lm.model, requests):
            if isinstance(event, Finished):
                i = start + event.row
                answer = lm.result(event, seed + i)
                results[i] = Result(items[i], answer, task.check(items[i], answer))
                if progress:
                    progress(len(results))
    return [results[i] for i in range(len(items))]


def read_question(lm: LanguageModel, item: Item) -> Prompted:
    """An item's question as the model reads it."""
    question: Any = [dict(message) for message in item.question]
    tools = [dict(tool) for tool in item.tools] or None
    if lm.template is None and len(question) == 1 and not tools and not item.think:
        question = question[0]["content"]  # a plain continuation is all that such a checkpoint knows
    return lm.read(question, think=item.think, tools=tools)


def summary(results: Sequence[Result]) -> list[Row]:
    """A row for each level, in the order in which they come, and one for all."""
    if not results:
        raise ValueError("there are no results to sum up")
    levels = dict.fromkeys(r.level for r in results)
    return [*(_row(level, [r for r in results if r.level == level]) for level in levels), _row(ALL, results)]


def _row(level: str, results: Sequence[Result]) -> Row:
    parts = dict.fromkeys(name for r in results for name in r.score.parts)
    steps = sum(r.steps for r in results)
    return Row(
        level=level,
        count=len(results),
        exact=Share.of(r.score.exact for r in results),
        valid=Share.of(r.score.valid for r in results),
        parts={name: fmean(r.score.parts[name] for r in results if name in r.score.parts) for name in parts},
        steps=steps / len(results),
        tokens_per_forward=sum(len(r.answer.tokens) for r in results) / max(1, steps),
        converged=fmean(r.converged for r in results),
    )


def wilson(hits: int, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """The score interval of a share, without continuity correction (Wilson 1927, JASA 22, 209-212).

    It stays within 0 and 1 and has a width at 0 and at `count` hits, where the usual p ± z √(p(1-p)/n) has none.
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p, spread = hits / count, z * z / count
    centre = (p + spread / 2) / (1 + spread)
    half = z * sqrt(p * (1 - p) / count + spread / (4 * count)) / (1 + spread)
    # At the ends the formula gives 0 and 1 exactly; rounding does not.
    return (0.0 if hits == 0 else centre - half), (1.0 if hits == count else centre + half)
