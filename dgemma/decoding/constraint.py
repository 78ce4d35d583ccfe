"""Answers that keep to an automaton: dynamic programming over a canvas, exact for the beliefs of every position.

With beliefs p_i(v) of positions i, weights forward a_i(q) and backward b_i(q) over states q give the marginals
p'_i(v) ∝ p_i(v) · sum_q a_i(q) b_{i+1}(next(q, v)), proposals that are valid as a whole (filter backward, sample
forward), and the most probable valid canvas (Viterbi). Regular languages as in DINGO, arXiv 2505.23061; here tokens are
grouped into classes that lead from every state to the same one, and the classes that lead from one state to another
into labels, of which there are few. Weights are binary logarithms, float64.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from dgemma.decoding.vocabulary import NEVER

MANY = 256
"""Tokens from which on a class is added up by itself."""
SMALL = 2.0**-800
"""Sums above it have lost nothing to underflow that could be seen in them."""


@dataclass(frozen=True, eq=False)
class TokenAutomaton:
    """A deterministic automaton over tokens; state 0 is the start.

    classes: int32 [V], the class of each token, 0 for tokens that stand nowhere; table: int32 [Q, K], the next state
    from each state by each class, -1 for none, all -1 for class 0; done: bool [Q], states in which the text may end.
    End tokens are tokens like any other: whoever makes the automaton lets them lead from a whole text to a done state.
    """

    classes: np.ndarray
    table: np.ndarray
    done: np.ndarray

    def after(self, tokens: Sequence[int], state: int = 0) -> int:
        """The state behind some tokens; -1 if they are not the beginning of any text."""
        for token in tokens:
            if state < 0:
                break
            state = int(self.table[state, self.classes[token]])
        return state

    def before(self, ends: np.ndarray, pin: int | None = None) -> np.ndarray:
        """States, bool [Q], from which one token, or the one that is pinned, leads into `ends`."""
        if pin is not None:
            targets = self.table[:, self.classes[pin]]
            return ends[targets] & (targets >= 0)
        found = np.zeros_like(ends)
        found[self.arcs.by_source.keys] = self.arcs.by_source.most(ends[self.arcs.targets])
        return found

    @cached_property
    def order(self) -> np.ndarray:
        """Tokens that stand somewhere, class by class."""
        ordered = np.argsort(self.classes, kind="stable")
        return ordered[np.searchsorted(self.classes[ordered], 1) :]

    @cached_property
    def bounds(self) -> np.ndarray:
        """Where each class from 1 on begins in `order`, and where the last one ends, [K]."""
        return np.searchsorted(self.classes[self.order], np.arange(1, self.table.shape[1] + 1))

    @cached_property
    def runs(self) -> list[np.ndarray]:
        """`bounds` in pieces that share their ends: a class of MANY tokens alone, and those between them together."""
        cuts = {0, len(self.bounds) - 1}
        for kind in (np.diff(self.bounds) >= MANY).nonzero()[0].tolist():
            cuts |= {kind, kind + 1}
        ordered = sorted(cuts)
        return [self.bounds[a : b + 1] for a, b in pairwise(ordered)]

    @cached_property
    def arcs(self) -> "Arcs":
        return Arcs.of(self.table)


@dataclass(frozen=True)
class Groups:
    """Places in the order of a key, and where each distinct key begins among them; values come in that order."""

    order: np.ndarray
    begins: np.ndarray
    counts: np.ndarray
    keys: np.ndarray

    @classmethod
    def of(cls, keys: np.ndarray) -> "Groups":
        order = np.argsort(keys, kind="stable")
        distinct, begins, counts = np.unique(keys[order], return_index=True, return_counts=True)
        return cls(order, begins, counts, distinct)

    def sum(self, ordered: np.ndarray) -> np.ndarray:
        """Sums of each group, along the last axis."""
        return np.add.reduceat(ordered, self.begins, axis=-1)

    def most(self, ordered: np.ndarray) -> np.ndarray:
        """Maxima likewise."""
        return np.maximum.reduceat(ordered, self.begins, axis=-1)

    def logsum(self, ordered: np.ndarray) -> np.ndarray:
        """log2 of the sums of 2^values."""
        most = self.most(ordered)
        return most + np.log2(self.sum(np.exp2(ordered - np.repeat(most, self.counts, axis=-1))))


@dataclass(frozen=True)
class Arcs:
    """The pairs (source, target) of states that a token joins, [P], label by label.

    labels: the P by label; source, target: their states. kinds: the classes of each label, label by label, [M], in the
    groups `members`; by_kind: the M by class, and `owner` the label of each in that order. by_source, by_target: the P
    by state, and `targets`, `sources` their other states in those orders.
    """

    source: np.ndarray
    target: np.ndarray
    label: np.ndarray
    labels: Groups
    kinds: np.ndarray
    members: Groups
    by_kind: Groups
    owner: np.ndarray
    by_source: Groups
    targets: np.ndarray
    by_target: Groups
    sources: np.ndarray

    @classmethod
    def of(cls, table: np.ndarray) -> "Arcs":
        source, kind = (table >= 0).nonzero()
        joined = Groups.of(source.astype(np.int64) * len(table) + table[source, kind])
        numbers: dict[bytes, int] = {}
        parts = np.split(kind[joined.order], joined.begins[1:])
        label = np.array([numbers.setdefault(part.tobytes(), len(numbers)) for part in parts])
        by_label = np.argsort(label, kind="stable")
        label = label[by_label]
        source, target = np.divmod(joined.keys[by_label], len(table))
        lists = [np.frombuffer(key, kind.dtype) for key in numbers]
        kinds, owner = np.concatenate(lists), np.repeat(np.arange(len(lists)), [*map(len, lists)])
        by_kind, by_source, by_target = map(Groups.of, (kinds, source, target))
        return cls(
            *(source, target, label, Groups.of(label), kinds, Groups.of(owner), by_kind, owner[by_kind.order]),
            *(by_source, target[by_source.order], by_target, source[by_target.order]),
        )


@dataclass(frozen=True)
class Solution:
    """bonus: what a class's log2 weights gain at each position, but for a constant, [C, K]; best: the classes of the
    most probable canvas, [C]; drawn: those of a proposal, with what is `left` of each draw to choose a token of the
    class by, [C] in [0, 1).
    """

    bonus: np.ndarray
    best: np.ndarray
    drawn: np.ndarray
    left: np.ndarray


@dataclass(frozen=True)
class Guide:
    """A canvas's part of an automaton: the state it begins in, the states, bool [Q], that it may end in, its pinned
    tokens by position, and how many positions are bound: behind an answer's limit none is.
    """

    automaton: TokenAutomaton
    state: int
    ends: np.ndarray
    pins: Mapping[int, int]
    length: int

    def solve(self, sums: np.ndarray, peaks: np.ndarray, uniform: np.ndarray) -> Solution:
        """From log2 weights of the classes at each position: `sums` over their tokens, and `peaks`, [C, K] each."""
        arcs = self.automaton.arcs
        sums, peaks = self._pinned(sums), self._pinned(peaks)
        ahead, behind = self._messages(arcs.members.logsum(sums[:, arcs.kinds])[:, arcs.label])
        by_label = arcs.labels.logsum(ahead[:-1, arcs.source] + behind[1:, arcs.target])
        bonus = np.full_like(sums, NEVER)
        bonus[:, arcs.by_kind.keys] = arcs.by_kind.logsum(by_label[:, arcs.owner])
        likeliest = arcs.members.most(peaks[:, arcs.kinds])[:, arcs.label]
        best, _ = self._walk(peaks, self._backward(likeliest, arcs.by_source.most), None)
        return Solution(bonus, best, *self._walk(sums, behind, uniform))

    def _pinned(self, weights: np.ndarray) -> np.ndarray:
        weights = weights.copy()
        for place, token in self.pins.items():
            weights[place] = NEVER
            weights[place, self.automaton.classes[token]] = 0
        return weights

    def _messages(self, by_pair: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """log2 weights of all beginnings that end in a state, and of all continuations from it, [C + 1, Q] each, up to
        a constant for each position.
        """
        arcs = self.automaton.arcs
        weights = np.exp2(by_pair - by_pair.max(-1, keepdims=True))
        ahead, behind = (np.zeros((len(weights) + 1, len(self.ends))) for _ in range(2))
        ahead[0, self.state], behind[-1, self.ends] = 1, 1
        for i, here in enumerate(weights[:, arcs.by_target.order]):
            found = arcs.by_target.sum(ahead[i, arcs.sources] * here)
            ahead[i + 1, arcs.by_target.keys] = found / (found.max() or 1)
        for i, here in reversed([*enumerate(weights[:, arcs.by_source.order])]):
            found = arcs.by_source.sum(behind[i + 1, arcs.targets] * here)
            behind[i, arcs.by_source.keys] = found / (found.max() or 1)
        if (ahead * behind).sum(-1).min() > SMALL:
            with np.errstate(divide="ignore"):
                return np.maximum(np.log2(ahead), NEVER), np.maximum(np.log2(behind), NEVER)
        # Beginnings and continuations disagree by more than a float can hold.
        return self._forward(by_pair), self._backward(by_pair, arcs.by_source.logsum)

    def _forward(self, by_pair: np.ndarray) -> np.ndarray:
        arcs = self.automaton.arcs
        ahead = np.full((len(by_pair) + 1, len(self.ends)), NEVER)
        ahead[0, self.state] = 0
        for i, here in enumerate(by_pair[:, arcs.by_target.order]):
            ahead[i + 1, arcs.by_target.keys] = arcs.by_target.logsum(ahead[i, arcs.sources] + here)
        return ahead

    def _backward(self, by_pair: np.ndarray, join: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        arcs = self.automaton.arcs
        behind = np.full((len(by_pair) + 1, len(self.ends)), NEVER)
        behind[-1, self.ends] = 0
        for i, here in reversed([*enumerate(by_pair[:, arcs.by_source.order])]):
            behind[i, arcs.by_source.keys] = join(behind[i + 1, arcs.targets] + here)
        return behind

    def _walk(
        self, weights: np.ndarray, behind: np.ndarray, uniform: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """A class for each position, the likeliest or drawn, [C]; and what is left of each draw, in [0, 1)."""
        state, classes, left = self.state, np.empty(len(weights), np.int64), np.zeros(len(weights))
        for i, here in enumerate(weights):
            targets = self.automaton.table[state]
            values = np.where(targets >= 0, here + behind[i + 1, targets], 2 * NEVER)
            chosen = int(values.argmax())
            if uniform is not None:
                shares = np.exp2(values - values[chosen])
                ends = shares.cumsum()
                at = uniform[i] * ends[-1]
                chosen = min(int(np.searchsorted(ends, at, side="right")), int(shares.nonzero()[0][-1]))
                left[i] = 1 - (ends[chosen] - at) / shares[chosen]
            classes[i], state = chosen, int(targets[chosen])
        return classes, left.clip(0, 1 - 2**-53)
