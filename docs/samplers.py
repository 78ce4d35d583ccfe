"""Ways to accept tokens, compared on the embedded models: `python docs/samplers.py` draws docs/samplers.png.

The release's entropy bound is what ships; the others live here, put into the loop from outside, because they did not
earn a place in it (docs/log.md). Exact match is held against steps: a way is better only if it lies above the curve.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import matplotlib.pyplot as plt
import torch
from torch import Tensor

import dgemma
from dgemma.decoding import denoise, sampler
from dgemma.decoding.denoise import Canvas
from dgemma.decoding.vocabulary import Reading
from dgemma.evals import tasks
from dgemma.evals.measure import measure, summary
from dgemma.model.network import DiffusionGemma

LEVELS = ("36-44", "30-35")
BOUNDS = (0.02, 0.1, 1.0, 8.0, 30.0)


@dataclass(frozen=True)
class Way:
    """A family of samplers: its name, the values of its one setting, and what puts it into the loop."""

    name: str
    values: tuple[float, ...]
    options: Callable[[float], dict[str, Any]]
    patch: Callable[[float], Any]


@contextmanager
def nothing(value: float) -> Iterator[None]:
    yield


def threshold(value: float) -> Any:
    """Positions whose likeliest token has this probability, at least the surest one: Fast-dLLM, arXiv 2505.22618.

    The entropy of a sure position is about that of two outcomes: the threshold is put in terms of it, so that the loop
    stays as it is.
    """
    p = torch.tensor([value, 1 - value])
    most = float(-(p * p.log()).sum())

    def accept(entropy: Tensor, bound: Tensor) -> Tensor:
        return (entropy <= most) | (entropy == entropy.amin(-1, keepdim=True))

    return mock.patch.object(sampler, "accept", accept)


def leave_one_out(value: float) -> Any:
    """A corrector: an accepted token is judged by what the others say of it, its own vote divided out.

    By Bayes p(x0 | canvas) is proportional to p(x0 | the others) q(own token | x0); `value` is the chance that a kept
    token is noise after all. After arXiv 2605.22765.
    """

    def read(
        model: DiffusionGemma, states: Tensor, temperature: Tensor, uniform: Tensor, canvases: Sequence[Canvas]
    ) -> Reading:
        logits = model.embed_tokens.logits(states) / temperature[:, None, None]
        size = logits.shape[-1]
        tokens = torch.stack([c.tokens for c in canvases])
        kept = torch.stack([getattr(c, "kept", torch.zeros_like(c.pinned)) for c in canvases])
        vote = torch.log(torch.tensor((1 - value) * size / value + 1))
        own = torch.zeros_like(logits).scatter(-1, tokens[..., None], vote * kept[..., None])
        p = (logits - own).softmax(-1)
        entropy = -(p * p.clamp_min(1e-30).log()).sum(-1)
        accepted = sampler.accept(entropy, torch.tensor([c.options.entropy_bound for c in canvases]))
        for c, row in zip(canvases, accepted, strict=True):
            c.kept = row  # type: ignore[attr-defined]
        proposal = (p.cumsum(-1) > uniform[..., None]).int().argmax(-1)
        return Reading(logits.argmax(-1), entropy, proposal, model.embed_tokens.soft(logits.softmax(-1)))

    return mock.patch.object(denoise, "_read", read)


WAYS = (
    Way("entropy bound (the release's)", BOUNDS, lambda v: {"entropy_bound": v}, nothing),
    Way("entropy bound, likeliest token", BOUNDS, lambda v: {"entropy_bound": v, "greedy": True}, nothing),
    Way("confidence threshold", (0.3, 0.5, 0.7, 0.9), lambda v: {}, threshold),
    Way("leave-one-out, 0.5, by bound", BOUNDS[1:], lambda v: {"entropy_bound": v}, lambda v: leave_one_out(0.5)),
    Way("leave-one-out, 0.9, by bound", BOUNDS[1:], lambda v: {"entropy_bound": v}, lambda v: leave_one_out(0.9)),
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=100, help="puzzles of each level")
    count = parser.parse_args().count
    lm, task = dgemma.load("sudoku"), tasks.get("sudoku")
    figure, axes = plt.subplots(1, len(LEVELS), figsize=(11, 4.5), sharey=True)
    print("| givens | way | setting | exact | steps |\n|---|---|---|---|---|")
    for axis, level in zip(axes, LEVELS, strict=True):
        items = tasks.items(task, count, 7, held_out=True, level=level)
        for way in WAYS:
            points = []
            for value in way.values:
                with way.patch(value), torch.inference_mode():
                    row = summary(measure(lm, items, task, batch=50, **way.options(value)))[-1]
                points.append((row.steps, 100 * row.exact.share))
                print(f"| {level} | {way.name} | {value:g} | {points[-1][1]:.0f} % | {row.steps:.1f} |", flush=True)
            axis.plot(*zip(*points, strict=True), marker="o", label=way.name)
        axis.set(title=f"Sudoku, {level} givens, {count} puzzles", xlabel="denoising steps, mean")
    axes[0].set_ylabel("exact grids, %")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)
    short_canvases()


def short_canvases() -> None:
    """Canvases that fit a short answer, on `tiny`: exact match, and time of an answer."""
    lm = dgemma.load("tiny")
    print("\n| canvas | task | exact | steps | denoising, s an answer |\n|---|---|---|---|---|")
    for size in (96, 48, 24):
        config = replace(lm.model.config, canvas_length=size)
        with mock.patch.object(lm.model, "config", config), torch.inference_mode():
            for name in ("arithmetic", "sorting"):
                task = tasks.get(name)
                results = measure(lm, tasks.items(task, 42, 7, held_out=True), task, batch=1)
                row, seconds = summary(results)[-1], sum(r.answer.seconds["denoise"] for r in results) / len(results)
                print(f"| {size} | {name} | {100 * row.exact.share:.0f} % | {row.steps:.1f} | {seconds:.3f} |")


if __name__ == "__main__":
    main()
