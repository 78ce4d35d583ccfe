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

FEW = {"cuda": 0.5}
"""Share of the ways under which those at rest are left: a GPU replays a step as long as its rows are the same."""


@torch.no_grad()
def roll_out(model: DiffusionGemma, batch: Batch, drawn: Corruption, options: TrainOptions, step: int) -> Corruption:
    """Replaces a share `options.rollout` of the canvases by ones that the model itself has begun to denoise.

    Canvases of one place share a way there, and are taken after different numbers of steps, 1 to
    `options.rollout_steps`. A way that is still before its canvas would be taken leaves that canvas as it was drawn.
    """
    rng = random.Random(f"{options.seed}/rollout/{step}/{batch.start}")
    places: dict[tuple[int, int], list[int]] = {}
    for row, place in enumerate(zip(batch.owner, batch.start, strict=True)):
        if rng.random() < options.rollout:
            places.setdefault(place, []).append(row)
    if not places:
        return drawn
    cache = model.new_cache(len(places))
    tokens, shown = zip(*(batch.before(rows[0]) for rows in places.values()), strict=True)
    model.encode(tokens, cache, pictures=shown)
    config, decoding = model.config, GenerationConfig()
    noises = [Noise(rng.getrandbits(63), config.vocab_size, config.canvas_length) for _ in places]
    going = [Canvas.begin(model, i, 0, decoding, noise) for i, noise in enumerate(noises)]
    wanted: list[dict[int, int]] = []  # the rows that are still to be taken from each way, by the number of steps
    for rows in places.values():
        most = max(options.rollout_steps, len(rows))
        wanted.append(dict(zip(rng.sample(range(1, most + 1), len(rows)), rows, strict=True)))
    noised, conditioned = drawn.noised.to(model.device, copy=True), drawn.conditioned.clone()
    given = torch.zeros(*noised.shape, config.hidden_size, dtype=model.dtype, device=model.device)
    while going:
        denoise_step(model, cache.select([canvas.row for canvas in going]), going)
        for canvas in going:
            if canvas.steps in wanted[canvas.row]:
                row = wanted[canvas.row].pop(canvas.steps)
                noised[row], given[row], conditioned[row] = canvas.tokens, canvas.soft, False
            if canvas.still:
                wanted[canvas.row].clear()
        live = [canvas for canvas in going if wanted[canvas.row]]
        if len(live) <= FEW.get(model.device.type, 1) * len(going):
            going = live
    return dataclasses.replace(drawn, noised=noised, conditioned=conditioned, given=given)
