"""Canvases as the sampler leaves them, for a second stage that learns to need fewer steps.

Uniform corruption never shows a model what its own denoising looks like half-way: which tokens it accepts first, what
it believes by then. A canvas taken from there, with the answer as its target, teaches it to see the end from further
away. Source of the idea: self-distillation along a model's own trajectories, arXiv 2608.00146.
"""

import dataclasses
import random

import torch

from dgemma.config import GenerationConfig
from dgemma.decoding.denoise import Canvas, denoise_step
from dgemma.decoding.noise import Noise
from dgemma.model.network import DiffusionGemma
from dgemma.train.objective import Batch, Corruption
from dgemma.train.options import TrainOptions

MOST_STEPS = 8
"""A canvas is taken after 1 to so many steps: later ones are nearly still."""


@torch.no_grad()
def roll_out(model: DiffusionGemma, batch: Batch, drawn: Corruption, options: TrainOptions, step: int) -> Corruption:
    """Replaces a share `options.rollout` of the canvases by ones that the model itself has begun to denoise."""
    rng = random.Random(f"{options.seed}/rollout/{step}/{batch.start}")
    rows = [row for row in range(len(batch.clean)) if rng.random() < options.rollout]
    if not rows:
        return drawn
    cache = model.new_cache(len(rows))
    tokens, shown = zip(*(batch.before(row) for row in rows), strict=True)
    model.encode(tokens, cache, pictures=shown)
    config, decoding = model.config, GenerationConfig()
    noises = [Noise(rng.getrandbits(63), config.vocab_size, config.canvas_length) for _ in rows]
    canvases = [Canvas.begin(model, i, 0, decoding, noise) for i, noise in enumerate(noises)]
    ends = [rng.randint(1, MOST_STEPS) for _ in rows]
    going = canvases
    while going:
        denoise_step(model, cache.select([canvas.row for canvas in going]), going)
        going = [canvas for canvas in going if canvas.steps < ends[canvas.row] and not canvas.still]
    noised, conditioned = drawn.noised.clone(), drawn.conditioned.clone()
    given = torch.zeros(*noised.shape, config.hidden_size, dtype=model.dtype)
    for row, canvas in zip(rows, canvases, strict=True):
        noised[row], given[row], conditioned[row] = canvas.tokens.cpu(), canvas.soft.cpu(), False
    return dataclasses.replace(drawn, noised=noised, conditioned=conditioned, given=given)
