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
from dgemma.kernels import native
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
    n = guide.length
    scores = head.scores_by_token(states[0, :n])
    solved = _natively if native.fits(scores.dtype, scores) else _plainly
    draws = uniform[0, :n].numpy(force=True).astype(np.float64)
    best, entropy, proposal, free, total = solved(scores, head.cap, temperature, draws, guide, bound, soft)
    expected = None
    if free is not None:
        expected = (head.expected(free.T)[None] * (head.scale / total)[None, :, None]).to(states.dtype)
    best, entropy, proposal = (x[None].to(scores.device) for x in (best, entropy, proposal))
    found = Reading(best, entropy, proposal, expected)
    if n == states.shape[1]:
        return found
    return joined([found, read(head, states[:, n:], temperature, uniform[:, n:], soft)], 1)


Solved = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]
"""best, entropy, proposal [N]; the weights without a constraint, [V, N], over the greatest; and their sums [N]."""


def _natively(
    scores: Tensor, cap: float, temperature: Tensor, draws: np.ndarray, guide: Guide, bound: float, soft: bool
) -> Solved:
    """`_plainly` in three passes over scores [V, N]."""
    kinds = guide.automaton.table.shape[1]
    read = native.ByClass(scores, torch.from_numpy(guide.automaton.classes), kinds, cap, temperature)
    peaks, sums = read.peaks.double().numpy(), torch.maximum(read.sums, read.peaks).double().numpy()
    peaks[:, 0] = sums[:, 0] = NEVER
    solution = guide.solve(sums, peaks, draws)
    bonus, chosen = torch.from_numpy(solution.bonus), torch.from_numpy(solution.best)
    best, entropy, free, total = read.believe(bonus, chosen, soft)
    drawn = np.zeros_like(solution.drawn)
    taken = _acceptable(entropy.numpy(), guide, bound)
    drawn[taken] = solution.drawn[taken]
    proposal = read.draw(torch.from_numpy(drawn), torch.from_numpy(solution.left))
    return best, entropy, torch.where(proposal < 0, best, proposal), free, total


def _plainly(
    scores: Tensor, cap: float, temperature: Tensor, draws: np.ndarray, guide: Guide, bound: float, soft: bool
) -> Solved:
    """From scores [V, N] on: sums by class, the solution, and what is believed then."""
    n, a = guide.length, guide.automaton
    order = torch.from_numpy(a.order).to(scores.device)
    columns = max(1, TILE_BYTES // (4 * len(scores)))
    tiles = [slice(i, min(n, i + columns)) for i in range(0, n, columns)]

    def z(places: slice | Tensor) -> Tensor:
        """log2 weights, [V, places]."""
        return log2_weights_(scores[:, places].to(torch.float32, copy=True), cap, temperature)

    peaks, sums = (np.full((n, a.table.shape[1]), NEVER) for _ in range(2))
    for tile in tiles:
        peaks[tile, 1:], sums[tile, 1:] = by_class(z(tile).index_select(0, order), a)
    solution = guide.solve(sums, peaks, draws)

    at = torch.empty(n, dtype=torch.int64)
    entropy, total = (torch.empty(n, device=scores.device) for _ in range(2))
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
        entropy[tile] = mass.log() - math.log(2) * beliefs.mul_(weights).sum(0) / mass
        if free is not None:
            free[:, tile] = own.sub_(own.amax(0)).exp2_()
            total[tile] = own.sum(0)
    live = lambda places: z(places).index_select(0, order)  # noqa: E731
    # The likeliest token of all is nearly always of the likeliest class.
    best = torch.from_numpy(a.order[at.numpy()])
    others = (a.classes[best] != solution.best).nonzero()[0]
    best[others] = _chosen(live, a, others, solution.best, lambda rows, places: rows.argmax(0))
    proposal, left = best.clone(), torch.from_numpy(solution.left).to(scores.device)
    taken = _acceptable(entropy.numpy(force=True), guide, bound)
    proposal[taken] = _chosen(live, a, taken, solution.drawn, lambda rows, places: _draw(rows, left[places]))
    return best, entropy, proposal, free, total


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
