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

import numpy as np

from dgemma.decoding.vocabulary import NEVER

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
        found[self.arcs.by_source.keys] = self.arcs.by_source.most(ends[self.arcs.target])
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
    def arcs(self) -> "Arcs":
        return Arcs.of(self.table)


@dataclass(frozen=True)
class Groups:
    """Places in the order of a key, and where each distinct key begins among them."""

    order: np.ndarray
    begins: np.ndarray
    counts: np.ndarray
    keys: np.ndarray

    @classmethod
    def of(cls, keys: np.ndarray) -> "Groups":
        order = np.argsort(keys, kind="stable")
        distinct, begins, counts = np.unique(keys[order], return_index=True, return_counts=True)
        return cls(order, begins, counts, distinct)

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Sums of each group, along the last axis."""
        return np.add.reduceat(values[..., self.order], self.begins, axis=-1)

    def most(self, values: np.ndarray) -> np.ndarray:
        """Maxima likewise."""
        return np.maximum.reduceat(values[..., self.order], self.begins, axis=-1)

    def logsum(self, values: np.ndarray) -> np.ndarray:
        """log2 of the sums of 2^values."""
        most = self.most(values)
        weights = np.exp2(values[..., self.order] - np.repeat(most, self.counts, axis=-1))
        return most + np.log2(np.add.reduceat(weights, self.begins, axis=-1))


@dataclass(frozen=True)
class Arcs:
    """The pairs (source, target) of states that a token joins, [P], each with its label: the classes that join them.

    kinds: the classes of all labels, label by label, [M]; by_label, by_kind: the M grouped by label and by class;
    by_source, by_target: the P by state; pairs: the P by label.
    """

    source: np.ndarray
    target: np.ndarray
    label: np.ndarray
    kinds: np.ndarray
    by_label: Groups
    by_kind: Groups
    by_source: Groups
    by_target: Groups
    pairs: Groups

    @classmethod
    def of(cls, table: np.ndarray) -> "Arcs":
        source, kind = (table >= 0).nonzero()
        joined = Groups.of(source.astype(np.int64) * len(table) + table[source, kind])
        labels: dict[bytes, int] = {}
        parts = np.split(kind[joined.order], joined.begins[1:])
        label = np.array([labels.setdefault(part.tobytes(), len(labels)) for part in parts])
        members = [np.frombuffer(key, kind.dtype) for key in labels]
        kinds, owner = np.concatenate(members), np.repeat(np.arange(len(members)), [*map(len, members)])
        source, target = np.divmod(joined.keys, len(table))
        groups = (owner, kinds, source, target, label)
        return cls(source, target, label, kinds, *map(Groups.of, groups))


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
        by_pair = arcs.by_label.logsum(sums[:, arcs.kinds])[:, arcs.label]
        ahead, behind = self._messages(by_pair)
        by_label = arcs.pairs.logsum(ahead[:-1, arcs.source] + behind[1:, arcs.target])
        bonus = np.full_like(sums, NEVER)
        bonus[:, arcs.by_kind.keys] = arcs.by_kind.logsum(by_label[:, np.repeat(arcs.pairs.keys, arcs.by_label.counts)])
        likeliest = arcs.by_label.most(peaks[:, arcs.kinds])[:, arcs.label]
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
        for i, here in enumerate(weights):
            found = arcs.by_target.sum(ahead[i, arcs.source] * here)
            ahead[i + 1, arcs.by_target.keys] = found / (found.max() or 1)
        for i in range(len(weights) - 1, -1, -1):
            found = arcs.by_source.sum(behind[i + 1, arcs.target] * weights[i])
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
        for i, here in enumerate(by_pair):
            ahead[i + 1, arcs.by_target.keys] = arcs.by_target.logsum(ahead[i, arcs.source] + here)
        return ahead

    def _backward(self, by_pair: np.ndarray, join: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        arcs = self.automaton.arcs
        behind = np.full((len(by_pair) + 1, len(self.ends)), NEVER)
        behind[-1, self.ends] = 0
        for i in range(len(by_pair) - 1, -1, -1):
            behind[i, arcs.by_source.keys] = join(behind[i + 1, arcs.target] + by_pair[i])
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
