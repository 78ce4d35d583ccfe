"""The pass over the vocabulary for a row that keeps to an automaton: sums by class, the solution, then the beliefs."""

import math

import numpy as np
import torch
from torch import Tensor

from dgemma.decoding.constraint import Guide
from dgemma.decoding.vocabulary import NEVER, TILE_BYTES, Reading, joined, log2_weights_, read
from dgemma.model.head import TiedEmbedding


@torch.no_grad()
def read_guided(
    head: TiedEmbedding, states: Tensor, temperature: Tensor, uniform: Tensor, guide: Guide, soft: bool = True
) -> Reading:
    """As `vocabulary.read`, for one row [1, C, hidden]: what is believed once the whole canvas must fit.

    entropy and soft are those of the marginals; best is the most probable canvas that fits, proposal one drawn from all
    of them. Positions behind the guide's length are bound by nothing.
    """
    n, a = guide.length, guide.automaton
    scores = head.scores(states[0, :n])
    rows = max(1, TILE_BYTES // (4 * scores.shape[-1]))
    tiles = [slice(i, min(n, i + rows)) for i in range(0, n, rows)]
    live = torch.from_numpy(a.order).to(scores.device)

    def beliefs(tile: slice) -> Tensor:
        """log2 weights of the tokens that may stand somewhere, class by class."""
        return log2_weights_(scores[tile].index_select(1, live).float(), head.cap, temperature[:, None])

    sums, peaks = np.empty((n, a.table.shape[1])), np.empty((n, a.table.shape[1]))
    for tile in tiles:
        sums[tile], peaks[tile] = by_class(beliefs(tile).numpy(force=True), a.bounds)
    solution = guide.solve(sums, peaks, uniform[0, :n].double().numpy(force=True))

    best, proposal = torch.empty(1, n, dtype=torch.int64), torch.empty(1, n, dtype=torch.int64)
    entropy, total = (torch.empty(1, n, device=scores.device) for _ in range(2))
    bonus = torch.from_numpy(solution.bonus[:, 1:].astype(np.float32)).to(scores.device)
    sizes = torch.from_numpy(np.diff(a.bounds)).to(scores.device)
    for tile in tiles:
        z = beliefs(tile)
        for i, row in enumerate(z, tile.start):
            first, last = a.bounds[solution.best[i] - 1 : solution.best[i] + 1]
            best[0, i] = a.order[first + int(row[first:last].argmax())]
            first, last = a.bounds[solution.drawn[i] - 1 : solution.drawn[i] + 1]
            ends = (row[first:last] - row[first:last].max()).exp2().cumsum(-1)
            chosen = int(torch.searchsorted(ends, ends[-1] * solution.left[i], right=True))
            proposal[0, i] = a.order[first + min(chosen, int((ends < ends[-1]).sum()))]
        z += bonus[tile].repeat_interleave(sizes, 1, output_size=len(live))
        z -= z.amax(-1, keepdim=True)
        weights = z.exp2()
        total[0, tile] = weights.sum(-1)
        # H = log Z - E[log weight]
        entropy[0, tile] = total[0, tile].log() - math.log(2) * z.mul_(weights).sum(-1) / total[0, tile]
        scores[tile] = 0
        scores[tile, live] = weights.to(scores.dtype)
    expected = (scores @ head.weight)[None] * (head.scale / total)[..., None] if soft else None
    found = Reading(best.to(scores.device), entropy, proposal.to(scores.device), expected)
    if n == states.shape[1]:
        return found
    return joined([found, read(head, states[:, n:], temperature, uniform[:, n:], soft)], 1)


def by_class(weights: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log2 of the sums of 2^weights in each class, and the maxima: of [N, tokens by class] float32, [N, K] each.

    bounds: where each class but 0, which is empty, begins; and the end. A sum that float32 cannot hold counts as its
    greatest term, so that no class that may stand loses all its weight.
    """
    peaks = np.maximum.reduceat(weights, bounds[:-1], axis=1)
    # The cap leaves logits some 200 bits apart, which float32 holds around its middle.
    top = peaks.max(axis=1, keepdims=True) - 90
    with np.errstate(divide="ignore"):
        sums = top + np.log2(np.add.reduceat(np.exp2(weights - top), bounds[:-1], axis=1))
    nothing = np.full((len(weights), 1), NEVER)
    return np.hstack([nothing, np.maximum(sums, peaks)]), np.hstack([nothing, peaks])
