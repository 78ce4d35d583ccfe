"""All randomness of a generation, from a seed: the same draws on any machine, whatever else is in the batch."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

CANVAS, RENOISE, UNIFORM = range(3)


class Noise:
    """Draws of one request, each fixed by (seed, block, step, position) through the counter of a Philox generator.

    Subclass or imitate it to inject recorded draws: three methods, each returning one canvas of C values. Blocks count
    from 0; steps count 1, 2, 3 … as they are done.
    """

    def __init__(self, seed: int, vocab_size: int, canvas_length: int):
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"seed must lie in 0 … 2^64 - 1, not {seed}")
        self.seed, self.vocab_size, self.canvas_length = seed, vocab_size, canvas_length

    def canvas(self, block: int) -> Tensor:
        """Tokens that a block begins with, int64 [C], uniform over the vocabulary."""
        return self._tokens(CANVAS, block, 0)

    def renoise(self, block: int, step: int) -> Tensor:
        """Tokens for the positions that a step does not accept, int64 [C]."""
        return self._tokens(RENOISE, block, step)

    def uniform(self, block: int, step: int) -> Tensor:
        """What the proposals of a step are drawn with, float32 [C] in [0, 1)."""
        return torch.from_numpy((self._raw(UNIFORM, block, step) >> 40).astype(np.float32) * np.float32(2**-24))

    def _tokens(self, stream: int, block: int, step: int) -> Tensor:
        high = self._raw(stream, block, step) >> np.uint64(32)
        return torch.from_numpy((high * np.uint64(self.vocab_size) >> np.uint64(32)).astype(np.int64))

    def _raw(self, stream: int, block: int, step: int) -> np.ndarray:
        # The lowest word of the counter runs along the positions; the others name the draw.
        return np.random.Philox(key=self.seed, counter=[0, stream, block, step]).random_raw(self.canvas_length)


def stacked(draws: Sequence[Tensor], device: torch.device) -> Tensor:
    """One draw of each row, [B, C], on the model's device."""
    return torch.stack(list(draws)).to(device)
