"""Holds an engine against the golden results and says what its first difference looks like."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dgemma.conformance.adapter import Adapter
from dgemma.conformance.case import (
    DATA,
    OPTIONAL,
    Case,
    Difference,
    answer_outcome,
    differing,
    encoded_outcome,
    first_difference,
)

MASK, SCORES = "a_mask_over_the_whole_prompt", "scores_of_a_prompt_in_one_piece"
"""The mistakes that leave all values right."""


@dataclass(frozen=True)
class Finding:
    """What came of a case. verdict: "right", "wrong", "error" (the engine raised one), or "unseen" (it cannot be
    measured in this engine). looks_like: traps whose recorded results have the same first difference."""

    case: Case
    verdict: str
    told: str = ""
    place: str = ""
    looks_like: tuple[str, ...] = ()
    shown: frozenset[str] = frozenset()


def check(adapter: Adapter, cases: Sequence[Case], data: Path = DATA) -> Iterator[Finding]:
    """Runs cases, checkpoint by checkpoint. Errors of an engine are findings."""
    for name in dict.fromkeys(case.checkpoint for case in cases):
        some = [case for case in cases if case.checkpoint == name]
        try:
            adapter.load(data / name)
        except Exception as error:
            yield from (failed(case, error) for case in some)
            continue
        yield from (checked(adapter, case) for case in some)


def checked(adapter: Adapter, case: Case) -> Finding:
    """One case, on the checkpoint that is loaded."""
    try:
        if case.kind == "memory":
            return measured(adapter, case)
        if case.kind == "encode":
            found = encoded_outcome(adapter.encode(case.prompts, case.canvas, case.previous, case.shared))
        else:
            found = answer_outcome(adapter.generate(case.requests, case.shared))
    except Exception as error:
        return failed(case, error)
    shown = frozenset(place.rsplit(" ", 1)[1] for place in found)
    different = first_difference(case.golden, found)
    if different is None:
        return Finding(case, "right", shown=shown)
    return Finding(case, "wrong", different.told, different.place, tuple(alike(case, different)), shown)


def failed(case: Case, error: Exception) -> Finding:
    return Finding(case, "error", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def alike(case: Case, different: Difference) -> Iterator[str]:
    """Traps that differ there first, in the same way."""
    found = np.empty(0, np.int32) if different.found is None else different.found
    for trap, places in case.wrong.items():
        value = places.get(different.place)
        if value is not None and value.shape == found.shape and not differing(value, found):
            yield trap


class Largest(TorchDispatchMode):
    """Notes the largest result of any of torch's operations; one that exceeds the limit ends it."""

    def __init__(self, most: int):
        super().__init__()
        self.most, self.elements = most, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        held = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for value in tree_leaves(out):
            # A view takes no memory of its own.
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in held:
                self.elements = max(self.elements, value.numel())
                if value.numel() > self.most:
                    raise TooLargeError(value.numel(), value.dtype)
        return out


class TooLargeError(Exception):
    """An array that grows with the square of the prompt: its elements and dtype."""


def measured(adapter: Adapter, case: Case) -> Finding:
    """Encodes the long prompt under watch."""
    try:
        with Largest(case.most) as seen:
            adapter.encode(case.prompts, case.canvas, None, 0)
    except TooLargeError as error:
        elements, dtype = error.args
        told = f"holds {elements:,} elements of {str(dtype).removeprefix('torch.')} at once"
        return Finding(case, "wrong", told, "prefill", (SCORES if dtype.is_floating_point else MASK,))
    if not seen.elements:
        return Finding(case, "unseen", "the engine does not compute in torch")
    return Finding(case, "right")


@dataclass(frozen=True)
class Suspect:
    """A trap that explains wrong cases; missing: those where it should show too, and the engine is right."""

    trap: str
    cases: tuple[str, ...]
    missing: tuple[str, ...]


def suspects(findings: Iterable[Finding]) -> list[Suspect]:
    """The fewest traps that explain what is wrong, the most telling first: each explains cases that those before do
    not. Cases that no trap explains are left out."""
    findings = list(findings)
    left = {f.case.name: f for f in findings if f.looks_like}
    named = []
    while left:
        candidates = []
        for trap in sorted({trap for f in left.values() for trap in f.looks_like}):
            explained = tuple(f.case.name for f in findings if trap in f.looks_like)
            missing = tuple(f.case.name for f in findings if f.verdict == "right" and expected(f, trap))
            candidates.append(Suspect(trap, explained, missing))
        best = max(candidates, key=lambda s: (len(left.keys() & set(s.cases)), -len(s.missing)))
        named.append(best)
        left = {name: f for name, f in left.items() if name not in best.cases}
    return named


def expected(finding: Finding, trap: str) -> bool:
    """Whether the trap would have shown in what the engine shows of a case."""
    places = finding.case.wrong.get(trap, {})
    kinds = {place.rsplit(" ", 1)[1] for place in places}
    return any(kind not in OPTIONAL or kind in finding.shown for kind in kinds)
