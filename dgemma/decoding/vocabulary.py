"""One pass over the vocabulary: from final states to everything a step wants to know, a tile of rows at a time.

The logits of a canvas are large (256 x 262144 float32 = 256 MiB) and are looked at six times; tiles that stay in the
processor's cache, reused buffers and operations in place are what makes this cheap on a CPU.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dgemma.model.head import TiedEmbedding

TILE_BYTES = 8 << 20
BLOCK = 512
"""Probabilities are summed in blocks of this size to find a proposal without a running sum over the vocabulary."""


@dataclass(frozen=True)
class Reading:
    """What a step believes of each position, [B, C] each; `soft` is the expected embedding [B, C, hidden]."""

    best: Tensor
    entropy: Tensor
    proposal: Tensor
    soft: Tensor | None


def read(head: TiedEmbedding, states: Tensor, temperature: Tensor, uniform: Tensor, soft: bool = True) -> Reading:
    """Statistics of softmax(logits / temperature) for states [B, C, hidden], temperatures [B] and uniforms [B, C].

    best: arg-max; entropy: float32 nats; proposal: the smallest token v with cumsum(p)[v] > uniform. The expected
    embedding is made of the float32 probabilities; the reference rounds the logits to the weights' dtype before.
    """
    shape, hidden = states.shape[:2], states.shape[-1]
    x, u = states.reshape(-1, hidden), uniform.reshape(-1)
    t = temperature[:, None].expand(shape).reshape(-1, 1)
    tile = max(1, min(len(x), TILE_BYTES // (4 * head.num_embeddings)))
    best, entropy = torch.empty_like(u, dtype=torch.int64), torch.empty_like(u)
    proposal = torch.empty_like(best)
    expected = torch.empty_like(x) if soft else None
    weights = x.new_zeros(tile, -(-head.num_embeddings // BLOCK) * BLOCK, dtype=torch.float32)
    for start in range(0, len(x), tile):
        rows = slice(start, min(start + tile, len(x)))
        logits = head.logits(x[rows]).div_(t[rows])
        top, best[rows] = logits.max(dim=-1)
        logits.sub_(top[:, None])
        p = weights[: len(logits), : head.num_embeddings]
        torch.exp(logits, out=p)
        total = p.sum(-1)
        # H = log Z - E[log weight]; the product of two matrices' rows, without a third one.
        mean = torch.bmm(p[:, None], logits[:, :, None]).view(-1) / total
        entropy[rows] = total.log() - mean
        proposal[rows] = inverse_cdf(weights[: len(logits)], u[rows] * total, head.num_embeddings)
        if expected is not None:
            expected[rows] = head.soft(p.div_(total[:, None]))
    view = lambda y: y.view(*shape)  # noqa: E731
    return Reading(view(best), view(entropy), view(proposal), None if expected is None else expected.view_as(states))


def inverse_cdf(weights: Tensor, target: Tensor, size: int) -> Tensor:
    """The smallest index whose running sum exceeds target [N], in weights [N, V'] of which the first `size` count.

    V' is a multiple of BLOCK, filled up with zeros. Where rounding leaves the target at or above the sum of all, the
    last index with a weight is taken.
    """
    blocks = weights.view(len(weights), -1, BLOCK)
    ends = blocks.sum(-1).cumsum(-1)
    last = (ends < ends[:, -1:]).sum(-1)
    block = torch.searchsorted(ends, target[:, None], right=True).view(-1).minimum(last)
    row = torch.arange(len(weights), device=weights.device)
    before = torch.where(block > 0, ends[row, block - 1], 0)
    inner = blocks[row, block].cumsum(-1)
    index = torch.searchsorted(inner, (target - before)[:, None], right=True).view(-1)
    final = (inner < inner[:, -1:]).sum(-1)
    return (block * BLOCK + index.minimum(final)).clamp_(max=size - 1)
