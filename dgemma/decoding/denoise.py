"""One denoising step, written once, for a batch of rows that are each on their own way."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor

from dgemma.config import GenerationConfig
from dgemma.decoding import sampler, vocabulary
from dgemma.decoding.events import Step
from dgemma.decoding.noise import Noise, stacked
from dgemma.model.cache import Cache
from dgemma.model.network import DiffusionGemma


@dataclass
class Canvas:
    """A row's canvas on its way from noise to text: what the last step left, and what the stop test remembers."""

    row: int
    block: int
    options: GenerationConfig
    noise: Noise
    tokens: Tensor
    soft: Tensor
    steps: int = 0
    still: bool = False
    seconds: float = 0.0
    history: list[Tensor] = field(default_factory=list)

    @classmethod
    def begin(cls, model: DiffusionGemma, row: int, block: int, options: GenerationConfig, noise: Noise) -> "Canvas":
        """Pure noise, and nothing believed yet: self-conditioning starts as zero vectors, not as zero logits."""
        tokens = noise.canvas(block).to(model.device)
        nothing = torch.zeros(len(tokens), model.config.hidden_size, dtype=model.dtype, device=model.device)
        return cls(row, block, options, noise, tokens, nothing)

    @property
    def best(self) -> Tensor:
        """The clean arg-max of the last step, int64 [C] on the CPU: what a commit takes."""
        return self.history[-1]

    @property
    def remaining(self) -> int:
        """Steps left, the coming one included: the temperature follows these, not the steps done."""
        return self.options.max_denoising_steps - self.steps

    @property
    def done(self) -> bool:
        return self.still or self.remaining == 0


def denoise_step(model: DiffusionGemma, cache: Cache, canvases: Sequence[Canvas]) -> list[Step]:
    """Takes every canvas one step further; row b of the cache is the prefix of canvases[b]."""
    started = perf_counter()
    device, steps = model.device, [c.steps + 1 for c in canvases]
    temperatures = [c.options.temperature(c.remaining) for c in canvases]
    states = model.denoise_states(
        torch.stack([c.tokens for c in canvases]), cache, torch.stack([c.soft for c in canvases])
    )
    read = vocabulary.read(
        model.embed_tokens,
        states,
        torch.tensor(temperatures, device=device),
        stacked([c.noise.uniform(c.block, n) for c, n in zip(canvases, steps, strict=True)], device),
        soft=any(c.remaining > 1 for c in canvases),
    )
    bounds = torch.tensor([c.options.entropy_bound for c in canvases], device=device)
    accepted = sampler.accept(read.entropy, bounds)
    fresh = stacked([c.noise.renoise(c.block, n) for c, n in zip(canvases, steps, strict=True)], device)
    greedy = torch.tensor([c.options.greedy for c in canvases], device=device)
    tokens = torch.where(accepted, torch.where(greedy[:, None], read.best, read.proposal), fresh)

    best, means = read.best.cpu(), read.entropy.mean(-1).tolist()
    seconds = (perf_counter() - started) / len(canvases)
    events = []
    for b, c in enumerate(canvases):
        o = c.options
        c.still = sampler.is_still(best[b], c.history, means[b], o.stability_threshold, o.confidence_threshold)
        c.history = [*c.history, best[b]][-max(1, o.stability_threshold) :]
        c.tokens, c.steps, c.seconds = tokens[b], steps[b], c.seconds + seconds
        if read.soft is not None:
            c.soft = read.soft[b]
        seen = (best[b], tokens[b].cpu(), accepted[b].cpu(), read.entropy[b].cpu())
        events.append(Step(c.row, c.block, c.steps, temperatures[b], *seen, means[b], c.still))
    return events
