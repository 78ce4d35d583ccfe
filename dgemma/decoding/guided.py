"""The pass over the vocabulary for a row that keeps to an automaton: sums by class, the solution, then the beliefs.

Everything lies token by position, tokens class by class: a class is then one piece of memory.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dgemma.decoding.constraint import Guide, TokenAutomaton
from dgemma.decoding.vocabulary import NEVER, Reading, joined, log2_weights_, read
from dgemma.model.head import TiedEmbedding

TILE_BYTES = 8 << 20


@torch.no_grad()
def read_guided(
    head: TiedEmbedding,
    states: Tensor,
    temperature: Tensor,
    uniform: Tensor,
    guide: Guide,
    bound: float,
    soft: bool = True,
) -> Reading:
    """As `vocabulary.read`, for one row [1, C, hidden]: what is believed once the whole canvas must fit.

    entropy is that of the marginals; best is the most probable canvas that fits; proposal is drawn from all that fit,
    where it may be accepted under the entropy bound, and is best elsewhere. soft is what the network itself believes:
    fed back the marginals, which are sure early, trained models settled on texts of the wrong length (docs/log.md).
    Positions behind the guide's length are bound by nothing.
    """
    n, a = guide.length, guide.automaton
    order = torch.from_numpy(a.order).to(states.device)
    scores = head.scores_by_token(states[0, :n])
    columns = max(1, TILE_BYTES // (4 * len(scores)))
    tiles = [slice(i, min(n, i + columns)) for i in range(0, n, columns)]

    def z(places: slice | Tensor) -> Tensor:
        """log2 weights, [V, places]."""
        return log2_weights_(scores[:, places].to(torch.float32, copy=True), head.cap, temperature)

    peaks, sums = (np.full((n, a.table.shape[1]), NEVER) for _ in range(2))
    for tile in tiles:
        peaks[tile, 1:], sums[tile, 1:] = by_class(z(tile).index_select(0, order), a)
    solution = guide.solve(sums, peaks, uniform[0, :n].double().numpy(force=True))

    at = torch.empty(n, dtype=torch.int64)
    entropy, total = (torch.empty(1, n, device=scores.device) for _ in range(2))
    bonus = torch.from_numpy(solution.bonus[:, 1:].T.astype(np.float32)).to(scores.device)
    sizes = torch.from_numpy(np.diff(a.bounds)).to(scores.device)
    free = torch.empty_like(scores) if soft else None
    for tile in tiles:
        own = z(tile)
        beliefs = own.index_select(0, order).add_(bonus[:, tile].repeat_interleave(sizes, 0, output_size=len(order)))
        top, at[tile] = beliefs.max(0)
        weights = beliefs.sub_(top).exp2()
        mass = weights.sum(0)
        # H = log Z - E[log weight]
        entropy[0, tile] = mass.log() - math.log(2) * beliefs.mul_(weights).sum(0) / mass
        if free is not None:
            free[:, tile] = own.sub_(own.amax(0)).exp2_()
            total[0, tile] = own.sum(0)
    live = lambda places: z(places).index_select(0, order)  # noqa: E731
    # The likeliest token of all is nearly always of the likeliest class.
    best = torch.from_numpy(a.order[at.numpy()])
    others = (a.classes[best] != solution.best).nonzero()[0]
    best[others] = _chosen(live, a, others, solution.best, lambda rows, places: rows.argmax(0))
    proposal, left = best.clone(), torch.from_numpy(solution.left).to(scores.device)
    taken = _acceptable(entropy[0].numpy(force=True), guide, bound)
    proposal[taken] = _chosen(live, a, taken, solution.drawn, lambda rows, places: _draw(rows, left[places]))
    expected = None
    if free is not None:
        expected = (head.expected(free.T)[None] * (head.scale / total)[..., None]).to(states.dtype)
    found = Reading(best[None].to(scores.device), entropy, proposal[None].to(scores.device), expected)
    if n == states.shape[1]:
        return found
    return joined([found, read(head, states[:, n:], temperature, uniform[:, n:], soft)], 1)


def _acceptable(entropy: np.ndarray, guide: Guide, bound: float) -> np.ndarray:
    """Positions that `sampler.accept` may take: those below the bound, and the next one, whose own does not count."""
    free = entropy.copy()
    free[list(guide.pins)] = np.inf
    below = free <= bound * 1.001 + 1e-6
    following = np.where(below, np.inf, free)
    return (below | (following == following.min())).nonzero()[0]


def by_class(z: Tensor, automaton: TokenAutomaton) -> tuple[np.ndarray, np.ndarray]:
    """Maxima, and log2 of the sums of 2^z, of each class but 0: of z [tokens by class, N], [N, K - 1] each.

    A sum that float32 cannot hold counts as its greatest term, so that no class that may stand loses all its weight.
    """
    peaks = _reduced(z, automaton, torch.amax, np.maximum)
    # The cap leaves logits some 200 bits apart, which float32 holds around its middle.
    top = torch.from_numpy(peaks.max(0)).to(z.device) - 90
    with np.errstate(divide="ignore"):
        sums = np.log2(_reduced((z - top).exp2(), automaton, torch.sum, np.add)) + top.numpy(force=True)
    return peaks.T, np.maximum(sums, peaks).T


def _reduced(
    z: Tensor, automaton: TokenAutomaton, large: Callable[[Tensor, int], Tensor], small: np.ufunc
) -> np.ndarray:
    """[K - 1, N]; one way for classes of many tokens, and one for many classes of few."""
    found = []
    for bounds in automaton.runs:
        rows = z[bounds[0] : bounds[-1]]
        if len(bounds) == 2:
            found.append(large(rows, 0).numpy(force=True)[None])
        else:
            found.append(small.reduceat(rows.numpy(force=True), bounds[:-1] - bounds[0], axis=0))
    return np.concatenate(found)


def _chosen(
    z: Callable[[Tensor], Tensor],
    automaton: TokenAutomaton,
    places: np.ndarray,
    classes: np.ndarray,
    pick: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """A token of its class for each of some positions: `pick` tells which, from the class's z and the positions."""
    tokens = torch.empty(len(places), dtype=torch.int64)
    for kind in np.unique(classes[places]):
        (own,) = (classes[places] == kind).nonzero()
        here = torch.from_numpy(places[own])
        first, last = automaton.bounds[kind - 1 : kind + 1]
        inside = pick(z(here)[first:last], here).numpy(force=True)
        tokens[torch.from_numpy(own)] = torch.from_numpy(automaton.order[first + inside])
    return tokens


def _draw(z: Tensor, left: Tensor) -> Tensor:
    """For each column the first row whose share, with all before it, exceeds what is left of a draw."""
    ends = (z - z.amax(0)).exp2().cumsum(0)
    return torch.minimum((ends <= ends[-1] * left).sum(0), (ends < ends[-1]).sum(0))
