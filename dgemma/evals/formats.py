"""What fewer bits cost: answers and logits of a model in each format, beside the same model in float32."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from dgemma.decoding.noise import Noise
from dgemma.evals.measure import Checker, Result, Share, measure, read_question
from dgemma.evals.tasks import Item
from dgemma.language_model import LanguageModel
from dgemma.picture import Prompted
from dgemma.quant.modules import matrices

NOISY = 0.5
"""The share of an answer that is noise in the canvases whose logits are compared."""


@dataclass(frozen=True)
class Cost:
    """A format's figures over all items.

    bits: of a quantised weight, scales included; divergence: KL(float32 || format) in nats a position; gained, lost:
    shares of items that only the format, or only float32, answers exactly; steps: mean of an answer.
    """

    format: str
    bits: float
    bytes: int
    divergence: float
    exact: Share
    gained: float
    lost: float
    steps: float


def measure_formats(
    load: Callable[[str | None], LanguageModel],
    formats: Sequence[str],
    asked: Sequence[tuple[Checker, Sequence[Item]]],
    batch: int = 32,
    seed: int = 0,
    progress: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> Iterator[Cost]:
    """The unquantised model's figures, then each format's, as they come.

    load: the model in float32, quantised to a format or not (None). asked: tasks and their items.
    """

    def answers(lm: LanguageModel) -> list[Result]:
        return [r for task, items in asked for r in measure(lm, items, task, batch, seed, **options)]

    progress("float32")
    plain = load(None)
    expected = answers(plain)
    canvases = [_canvas(plain, result, seed + i) for i, result in enumerate(expected)]
    beliefs = [_logits(plain, *canvas).log_softmax(-1) for canvas in canvases]
    yield _cost("float32", plain, expected, expected, 0.0)
    for format in formats:
        progress(format)
        lm = load(format)
        found = [
            float((belief.exp() * (belief - _logits(lm, *canvas).log_softmax(-1))).sum(-1).mean())
            for belief, canvas in zip(beliefs, canvases, strict=True)
        ]
        yield _cost(format, lm, answers(lm), expected, fmean(found))


def _canvas(lm: LanguageModel, result: Result, seed: int) -> tuple[Prompted, Tensor]:
    """The prompt, and the first canvas of an answer as the model gave it, half of it noise."""
    config = lm.model.config
    tokens = (result.answer.tokens + [lm.defaults.eos_token_id[0]] * config.canvas_length)[: config.canvas_length]
    noise = Noise(seed, config.vocab_size, config.canvas_length)
    clean = noise.uniform(0, 1) >= NOISY
    return read_question(lm, result.item), torch.where(clean, torch.tensor(tokens), noise.canvas(0))


@torch.inference_mode()
def _logits(lm: LanguageModel, prompt: Prompted, canvas: Tensor) -> Tensor:
    cache = lm.model.new_cache()
    lm.model.encode([torch.tensor(prompt.tokens)], cache, pictures=[prompt.pictures])
    return lm.model.denoise(canvas[None].to(lm.model.device), cache)[0]


def _cost(
    format: str, lm: LanguageModel, results: Sequence[Result], expected: Sequence[Result], divergence: float
) -> Cost:
    packed = matrices(lm.model).values()
    weights = sum(matrix.shape.numel() for matrix in packed)
    pairs = [(r.score.exact, e.score.exact) for r, e in zip(results, expected, strict=True)]
    return Cost(
        format=format,
        bits=8 * sum(matrix.nbytes for matrix in packed) / weights if weights else 32.0,
        bytes=sum(tensor.nbytes for tensor in lm.model.state_dict().values()),
        divergence=divergence,
        exact=Share.of(exact for exact, _ in pairs),
        gained=fmean(exact and not before for exact, before in pairs),
        lost=fmean(before and not exact for exact, before in pairs),
        steps=fmean(r.steps for r in results),
    )
