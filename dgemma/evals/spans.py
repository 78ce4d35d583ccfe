"""How often a span that is cut out of a right answer comes back: by infill, and left to right, which sees no suffix."""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from dgemma.evals.measure import ALL, Share, read_question
from dgemma.evals.tasks import Item
from dgemma.infill import gap_lengths
from dgemma.language_model import LanguageModel

LONGEST = 16
"""Tokens of a span at most; it is never more than half of the answer."""


@dataclass(frozen=True)
class Restored:
    """Whether the exact text came back: by infill that is told its length in tokens, or finds it among others; and left
    to right, from the prefix alone, with as many tokens.
    """

    level: str
    length: int
    told: bool
    found: bool
    left_to_right: bool


def measure_spans(
    lm: LanguageModel,
    items: Sequence[Item],
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
    **options: Any,
) -> list[Restored]:
    """A result for each item whose answer is text alone. Item i has the span and the noise of seed + i.

    progress: told the number of items so far. options: fields of GenerationConfig, for infill.
    """
    canvas = lm.model.config.canvas_length
    results = []
    for i, item in enumerate(items):
        if item.think or item.answer.get("tool_calls") or not item.answer.get("content"):
            continue
        prefix, span, suffix = cut(lm.tokenizer.encode(item.answer["content"]), random.Random(seed + i))
        before, wanted, after = (lm.tokenizer.decode(part) for part in (prefix, span, suffix))
        prompt = lm.tokens(read_question(lm, item))
        given = {"prompt": prompt, "seed": seed + i, **options}
        told = lm.infill(before, after, lengths=[len(span)], **given).text == wanted
        fitting = {n for n in gap_lengths(LONGEST, None, len(suffix), canvas) if n + len(suffix) <= canvas}
        found = lm.infill(before, after, lengths=sorted(fitting | {len(span)}), **given).text == wanted
        last = lm.generate([*prompt, *prefix], autoregressive=True, max_new_tokens=len(span))
        results.append(Restored(item.level, len(span), told, found, lm.tokenizer.decode(last.tokens) == wanted))
        if progress:
            progress(i + 1)
    if not results:
        raise ValueError("no item has an answer of text alone, to cut a span out of")
    return results


def cut(tokens: Sequence[int], rng: random.Random) -> tuple[list[int], list[int], list[int]]:
    """What stands before a span, the span and what follows it; something always does if there are two tokens."""
    length = rng.randint(1, max(1, min(LONGEST, len(tokens) // 2)))
    start = rng.randint(0, max(0, len(tokens) - length - 1))
    return list(tokens[:start]), list(tokens[start : start + length]), list(tokens[start + length :])


def summary(results: Sequence[Restored]) -> dict[str, dict[str, Any]]:
    """By level, and for all: the number of items, and a Share for each way."""

    def of(rows: Iterable[Restored]) -> dict[str, Any]:
        rows = list(rows)
        ways = {way: Share.of(getattr(row, way) for row in rows) for way in ("told", "found", "left_to_right")}
        return {"count": len(rows), **ways}

    levels = dict.fromkeys(row.level for row in results)
    return {level: of(row for row in results if row.level == level) for level in levels} | {ALL: of(results)}
