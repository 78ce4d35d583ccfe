"""One pass over the vocabulary: from final states to everything a step wants to know.

The logits of a canvas are large (256 x 262144 float32 = 256 MiB) and are looked at six times. Matrices are multiplied
for many rows at once, since the weights are read once for all of them; everything else happens a tile of few rows at a
time, in place, which stays in the processor's cache.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dgemma.kernels import native
from dgemma.model.head import TiedEmbedding

GROUP_BYTES, GROUP_ROWS = 16 << 20, 128
"""Rows multiplied at once: as many as these bytes hold, but no fewer than these rows."""
TILE_BYTES = 2 << 20
"""Of the tiles on a CPU; elsewhere a group is one tile."""
BLOCK = 512
"""Probabilities are summed in blocks of this size to find a proposal without a running sum over the vocabulary."""


@dataclass(frozen=True)
class Reading:
    """What a step believes of each position, [B, C] each; `soft` is the expected embedding [B, C, hidden]."""

    best: Tensor
    entropy: Tensor
    proposal: Tensor
    soft: Tensor | None

    @property
    def parts(self) -> tuple[Tensor, ...]:
        assert self.soft is not None
        return self.best, self.entropy, self.proposal, self.soft

    def rows(self, order: Sequence[int]) -> "Reading":
        chosen = list(order)
        soft = None if self.soft is None else self.soft[chosen]
        return Reading(self.best[chosen], self.entropy[chosen], self.proposal[chosen], soft)


def joined(parts: Sequence[Reading], dim: int) -> Reading:
    """Rows (0) or positions (1) that were read apart as one reading."""
    columns = zip(*((part.best, part.entropy, part.proposal) for part in parts), strict=True)
    best, entropy, proposal = (torch.cat(column, dim) for column in columns)
    soft = [part.soft for part in parts if part.soft is not None]
    return Reading(best, entropy, proposal, torch.cat(soft, dim) if soft else None)


@torch.no_grad()
def read(
    head: TiedEmbedding,
    states: Tensor,
    temperature: Tensor,
    uniform: Tensor,
    soft: bool = True,
    banned: tuple[Tensor, Tensor] | None = None,
) -> Reading:
    """Statistics of softmax(logits / temperature) for states [B, C, hidden], temperatures [B] and uniforms [B, C].

    best: arg-max; entropy: float32 nats; proposal: the smallest token v with cumsum(p)[v] > uniform. The expected
    embedding is made of the float32 probabilities; the reference rounds the logits to the weights' dtype before.
    banned: tokens [N], and whether each of them cannot stand at a position, bool [B, C, N].
    """
    shape, hidden, size = states.shape[:2], states.shape[-1], head.num_embeddings
    x, u = states.reshape(-1, hidden), uniform.reshape(-1)
    t = temperature[:, None].expand(shape).reshape(-1, 1)
    group = max(GROUP_ROWS, GROUP_BYTES // (x.element_size() * size))
    best, proposal = torch.empty_like(u, dtype=torch.int64), torch.empty_like(u, dtype=torch.int64)
    entropy, total = torch.empty_like(u), torch.empty_like(u)
    expected = torch.empty_like(x) if soft else None
    for first in range(0, len(x), group):
        rows = slice(first, first + group)
        scores = head.scores(x[rows])
        if banned is None and native.fits(scores.dtype, scores):
            found = native.read_rows(scores, head.cap, t[rows], u[rows])
        else:
            found = weigh_(scores, head.cap, t[rows], u[rows], banned and (banned[0], banned[1].flatten(0, 1)[rows]))
        best[rows], proposal[rows], entropy[rows], total[rows] = found
        if expected is not None:
            expected[rows] = head.expected(scores) * (head.scale / total[rows])[:, None]
        del scores  # before the next ones are made: the allocator then uses the same memory again
    view = lambda y: y.view(*shape)  # noqa: E731
    return Reading(view(best), view(entropy), view(proposal), None if expected is None else expected.view_as(states))


def weigh_(
    scores: Tensor, cap: float, temperature: Tensor, uniform: Tensor, banned: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(best, proposal, entropy, total) [N] of scores [N, V], in whose place the weights are left, the greatest 1.

    temperature [N, 1], uniform [N]; banned: tokens [M], bool [N, M].
    """
    size = scores.shape[1]
    tile = max(1, min(len(scores), TILE_BYTES // (4 * size))) if scores.is_cpu else max(1, len(scores))
    best, proposal = torch.empty_like(uniform, dtype=torch.int64), torch.empty_like(uniform, dtype=torch.int64)
    entropy, total = torch.empty_like(uniform), torch.empty_like(uniform)
    # Beyond the vocabulary, up to whole blocks, nothing has a weight.
    padded = -(-size // BLOCK) * BLOCK
    exponents = scores.new_full((tile, padded), -math.inf, dtype=torch.float32)
    weights = scores.new_zeros(tile, padded, dtype=torch.float32)
    for start in range(0, len(scores), tile):
        part = scores[start : start + tile]
        n, rows = len(part), slice(start, start + len(part))
        z, w = exponents[:n, :size], weights[:n, :size]
        log2_weights_(z.copy_(part), cap, temperature[rows])
        if banned is not None:
            z[:, banned[0]] = z[:, banned[0]].masked_fill(banned[1][rows], NEVER)
        best[rows], top = maximum(exponents[:n])
        torch.exp2(z.sub_(top), out=w)
        total[rows] = w.sum(-1)
        proposal[rows] = inverse_cdf(weights[:n], uniform[rows] * total[rows], size)
        part.copy_(w)
        # H = log Z - E[log weight]
        entropy[rows] = total[rows].log() - math.log(2) * z.mul_(w).sum(-1) / total[rows]
    return best, proposal, entropy, total


NEVER = -1e30
"""The logarithm of no weight at all, finite so that its differences and products are numbers."""


def log2_weights_(scores: Tensor, cap: float, temperature: Tensor) -> Tensor:
    """cap * tanh(scores / cap) / temperature / ln 2, less a constant, in place of float32 scores; temperatures [N, 1].

    tanh y = 1 - 2 / (exp 2y + 1), and a softmax does not see the 1. On a CPU exp2 takes a third of the time of exp and
    a ninth of that of tanh.
    """
    return scores.mul_(2 / (cap * math.log(2))).exp2_().add_(1).reciprocal_().mul_(-2 * cap / math.log(2) / temperature)


def maximum(values: Tensor) -> tuple[Tensor, Tensor]:
    """Of values [N, a multiple of BLOCK] the index of each row's maximum, the first of equals, [N], and itself [N, 1].

    Searching a row for an index takes far longer than for a maximum: only the maximum's block is searched.
    """
    blocks = values.view(len(values), -1, BLOCK)
    top, block = blocks.amax(-1).max(-1)
    row = torch.arange(len(values), device=values.device)
    return block * BLOCK + blocks[row, block].argmax(-1), top[:, None]


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
