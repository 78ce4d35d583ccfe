"""The rules of one denoising step: what is accepted, when a canvas is still. Shapes: B rows of C positions."""

from collections.abc import Sequence

import torch
from torch import Tensor


def accept(entropy: Tensor, bound: Tensor) -> Tensor:
    """Which positions to keep, bool [B, C]: those of least entropy, while the others among them stay below the bound.

    Position k in ascending order is kept if the entropies before it sum to at most bound [B] nats; so at least one is.
    Source: entropy-bounded sampling, arXiv 2505.24857.
    """
    ascending, order = entropy.sort(dim=-1)
    before = ascending.cumsum(-1) - ascending
    return torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, before <= bound[:, None])


def is_still(best: Tensor, history: Sequence[Tensor], mean_entropy: float, stability: int, confidence: float) -> bool:
    """Whether a row may stop: its best canvas [C] equals that of each of the last `stability` steps, and it is sure.

    history: best canvases of the steps before this one, oldest first.
    """
    if not mean_entropy < confidence or len(history) < stability:
        return False
    return all(torch.equal(best, earlier) for earlier in history[len(history) - stability :])
