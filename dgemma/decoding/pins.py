"""What is known of an answer before it is written: pinned tokens, a draft to begin from, an automaton to keep to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from dgemma.config import GenerationConfig, ModelConfig
from dgemma.decoding.constraint import Guide, TokenAutomaton
from dgemma.decoding.noise import Noise


@dataclass(frozen=True)
class Known:
    """Positions count from the answer's first token, through all of its canvases.

    pins: tokens by position, which the answer will have there whatever else it says. They cost nothing of
    max_new_tokens and never end the text, and no end token can stand before the last of them.
    draft: tokens that the canvases begin with instead of noise; level: the share of them that is noise all the same,
    and of the steps that are done, in (0, 1]. constraint: what the whole answer keeps to.
    """

    pins: Mapping[int, int] = field(default_factory=lambda: MappingProxyType({}))
    draft: Sequence[int] = ()
    level: float = 1.0
    constraint: TokenAutomaton | None = None

    def __post_init__(self) -> None:
        if not 0 < self.level <= 1:
            raise ValueError(f"the noise level must lie above 0 and be at most 1, not {self.level}")
        if any(place < 0 for place in self.pins):
            raise ValueError(f"the pin at {min(self.pins)} lies before the answer, whose positions count from 0")

    @property
    def pinned_until(self) -> int:
        """The position behind the last pin."""
        return max(self.pins, default=-1) + 1

    def length(self, options: GenerationConfig) -> int:
        """Positions of the longest answer: max_new_tokens of its own, and all pins among and right behind them."""
        free, place = options.max_new_tokens, 0
        for pin in sorted(self.pins):
            if pin - place > free:
                raise ValueError(
                    f"the pin at {pin} lies behind the answer, which ends before {place + free}: raise max_new_tokens"
                )
            free, place = free - (pin - place), pin + 1
        return place + free

    def check(self, options: GenerationConfig, config: ModelConfig) -> None:
        """ValueError if no answer can be had."""
        for what, tokens in (("a pin", self.pins.values()), ("the draft", self.draft)):
            for token in tokens:
                if not 0 <= token < config.vocab_size:
                    raise ValueError(f"{what} holds token {token}, which is not in 0 … {config.vocab_size - 1}")
        length = self.length(options)
        if self.constraint and not self._ends(self.constraint, length, 0)[0]:
            with_pins = " together with the pins" if self.pins else ""
            raise ValueError(f"no answer of at most {length} tokens fits the constraint{with_pins}")

    def canvas(self, noise: Noise, block: int, begin: int) -> Tensor:
        """What the canvas at positions begin … starts with, int64 [C]: the draft, or what of it is kept, and noise."""
        tokens = noise.canvas(block)
        drafted = torch.tensor(self.draft[begin : begin + len(tokens)], dtype=torch.int64)
        if not len(drafted):
            return tokens
        fresh = noise.uniform(block, 0)[: len(drafted)] < self.level
        return torch.cat([torch.where(fresh, tokens[: len(drafted)], drafted), tokens[len(drafted) :]])

    def guide(self, options: GenerationConfig, said: Sequence[int], canvas: int) -> Guide | None:
        """For the canvas that follows what has been said."""
        if self.constraint is None:
            return None
        begin, length = len(said), self.length(options)
        size = min(canvas, length - begin)
        pins = {place - begin: token for place, token in self.pins.items() if begin <= place < begin + size}
        ends = self._ends(self.constraint, length, begin + size)
        return Guide(self.constraint, self.constraint.after(said), ends, pins, size)

    def _ends(self, automaton: TokenAutomaton, length: int, place: int) -> np.ndarray:
        """The states, bool [Q], from which the positions from `place` to `length` can be filled."""
        ends, at = automaton.done, length
        while at > place:
            at -= 1
            before = automaton.before(ends, self.pins.get(at))
            if at >= self.pinned_until and np.array_equal(before, ends):
                at = max(place, self.pinned_until)  # nothing changes until there
            ends = before
        return ends


UNKNOWN = Known()
