"""One denoising step, written once, for a batch of rows that are each on their own way."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor

from dgemma.config import GenerationConfig
from dgemma.decoding import sampler, vocabulary
from dgemma.decoding.constraint import Guide
from dgemma.decoding.events import Step
from dgemma.decoding.guided import read_guided
from dgemma.decoding.noise import Noise, stacked
from dgemma.decoding.pins import UNKNOWN, Known
from dgemma.model.cache import Cache
from dgemma.model.network import DiffusionGemma


@dataclass
class Canvas:
    """A row's canvas on its way from noise to text: what the last step left, and what the stop test remembers.

    pinned: where a token is given, bool [C], and `given` the tokens there, int64 [C]; endless: positions at its
    beginning where no end token may stand; guide: its part of an automaton.
    """

    row: int
    block: int
    options: GenerationConfig
    noise: Noise
    tokens: Tensor
    soft: Tensor
    pinned: Tensor
    given: Tensor
    level: float = 1.0
    endless: int = 0
    guide: Guide | None = None
    steps: int = 0
    still: bool = False
    seconds: float = 0.0
    history: list[Tensor] = field(default_factory=list)

    @classmethod
    def begin(
        cls,
        model: DiffusionGemma,
        row: int,
        block: int,
        options: GenerationConfig,
        noise: Noise,
        known: Known = UNKNOWN,
        said: Sequence[int] = (),
    ) -> "Canvas":
        """What is known of it, and noise; `said` are the tokens of all canvases before.

        Nothing is believed yet: self-conditioning starts as zero vectors, not as zero logits.
        """
        begin, size = len(said), model.config.canvas_length
        tokens = known.canvas(noise, block, begin)
        pinned = torch.zeros(size, dtype=torch.bool)
        for place, token in known.pins.items():
            if begin <= place < begin + size:
                pinned[place - begin], tokens[place - begin] = True, token
        on_device = tokens.to(model.device)
        nothing = torch.zeros(size, model.config.hidden_size, dtype=model.dtype, device=model.device)
        canvas = cls(row, block, options, noise, on_device, nothing, pinned.to(model.device), on_device, known.level)
        canvas.endless = min(size, max(0, known.pinned_until - begin))
        canvas.guide = known.guide(options, said, size)
        if pinned[: known.length(options) - begin].all():  # there is nothing to find out
            canvas.still, canvas.history = True, [tokens]
        return canvas

    @property
    def best(self) -> Tensor:
        """The clean arg-max of the last step, int64 [C] on the CPU: what a commit takes."""
        return self.history[-1]

    @property
    def remaining(self) -> int:
        """Steps left, the coming one included: the temperature follows these, not the steps done."""
        return math.ceil(self.level * self.options.max_denoising_steps) - self.steps

    @property
    def done(self) -> bool:
        return self.still or self.remaining == 0


def denoise_step(model: DiffusionGemma, cache: Cache, canvases: Sequence[Canvas]) -> list[Step]:
    """Takes every canvas one step further; row b of the cache is the prefix of canvases[b]."""
    started = perf_counter()
    device, steps = model.device, [c.steps + 1 for c in canvases]
    temperatures = [c.options.temperature(c.remaining) for c in canvases]
    uniform = stacked([c.noise.uniform(c.block, n) for c, n in zip(canvases, steps, strict=True)], device)
    read = _read(model, cache, torch.tensor(temperatures, device=device), uniform, canvases)
    pinned = torch.stack([c.pinned for c in canvases])
    if any(c.endless for c in canvases):
        read = _pin(model, read, pinned, torch.stack([c.given for c in canvases]))
    bounds = torch.tensor([c.options.entropy_bound for c in canvases], device=device)
    accepted = sampler.accept(read.entropy.masked_fill(pinned, math.inf), bounds) | pinned
    fresh = stacked([c.noise.renoise(c.block, n) for c, n in zip(canvases, steps, strict=True)], device)
    greedy = torch.tensor([c.options.greedy for c in canvases], device=device)
    tokens = torch.where(accepted, torch.where(greedy[:, None], read.best, read.proposal), fresh)

    means = (read.entropy.sum(-1) / (~pinned).sum(-1)).tolist()
    best, new, kept, entropy = (t.cpu() for t in (read.best, tokens, accepted, read.entropy))
    seconds = (perf_counter() - started) / len(canvases)
    events = []
    for b, c in enumerate(canvases):
        o = c.options
        c.still = sampler.is_still(best[b], c.history, means[b], o.stability_threshold, o.confidence_threshold)
        c.history = [*c.history, best[b]][-max(1, o.stability_threshold) :]
        c.tokens, c.steps, c.seconds = tokens[b], steps[b], c.seconds + seconds
        if read.soft is not None:
            c.soft = read.soft[b]
        seen = (best[b], new[b], kept[b], entropy[b])
        events.append(Step(c.row, c.block, c.steps, temperatures[b], *seen, means[b], c.still))
    return events


def _read(
    model: DiffusionGemma, cache: Cache, temperature: Tensor, uniform: Tensor, canvases: Sequence[Canvas]
) -> vocabulary.Reading:
    """What each row believes: the rows that keep to an automaton one by one, all others together."""
    head, soft = model.embed_tokens, any(c.remaining > 1 for c in canvases)
    tokens, believed = torch.stack([c.tokens for c in canvases]), torch.stack([c.soft for c in canvases])
    if model.device.type == "cuda" and not any(c.guide or c.endless for c in canvases) and not model.waits:

        def step(tokens: Tensor, believed: Tensor, temperature: Tensor, uniform: Tensor) -> tuple[Tensor, ...]:
            return vocabulary.read(head, model.denoise_states(tokens, cache, believed), temperature, uniform).parts

        return vocabulary.Reading(*cache.replay()(step, tokens, believed, temperature, uniform))
    states = model.denoise_states(tokens, cache, believed)
    plain = [b for b, c in enumerate(canvases) if c.guide is None]
    if len(plain) == len(canvases):
        return vocabulary.read(head, states, temperature, uniform, soft, _banned(model, canvases))
    parts, order = [], [b for b, c in enumerate(canvases) if c.guide]
    for b in order:
        row, guide, bound = slice(b, b + 1), canvases[b].guide, canvases[b].options.entropy_bound
        assert guide
        parts.append(read_guided(head, states[row], temperature[row], uniform[row], guide, bound, soft))
    if plain:
        banned = _banned(model, [canvases[b] for b in plain])
        parts.append(vocabulary.read(head, states[plain], temperature[plain], uniform[plain], soft, banned))
    return vocabulary.joined(parts, 0).rows([(order + plain).index(b) for b in range(len(canvases))])


def _banned(model: DiffusionGemma, canvases: Sequence[Canvas]) -> tuple[Tensor, Tensor] | None:
    """End tokens [N], and where they cannot stand, bool [B, C, N]; None if they can stand anywhere."""
    if not any(c.endless for c in canvases):
        return None
    known = {token for c in canvases for token in c.options.eos_token_id}
    ends = sorted(token for token in known if token < model.config.vocab_size)
    own = torch.tensor([[token in c.options.eos_token_id for token in ends] for c in canvases], dtype=torch.bool)
    early = torch.arange(len(canvases[0].tokens)) < torch.tensor([c.endless for c in canvases])[:, None]
    banned = early[..., None] & own[:, None]
    return torch.tensor(ends, dtype=torch.int64, device=model.device), banned.to(model.device)


def _pin(model: DiffusionGemma, read: vocabulary.Reading, pinned: Tensor, given: Tensor) -> vocabulary.Reading:
    """Beliefs in which the given tokens [B, C] are certain."""
    soft = read.soft
    if soft is not None:
        soft = torch.where(pinned[..., None], model.embed_tokens(given), soft)
    best, proposal = (torch.where(pinned, given, tokens) for tokens in (read.best, read.proposal))
    return vocabulary.Reading(best, read.entropy.masked_fill(pinned, 0), proposal, soft)
