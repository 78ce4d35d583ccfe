"""Nodes into the smallest deterministic automaton over the bytes of UTF-8 and special tokens.

A set of symbols is an int: bit b stands for byte b, bit 256 + i for the i-th special token. Nodes become a
nondeterministic automaton from the end backwards, a node and the state behind it giving the state before it, so that
equal ends are built once and no state is without a way to the end; then come subsets and refinement of partitions.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import numpy as np

from dgemma.constraints.deterministic import Deterministic, smallest, trimmed
from dgemma.constraints.nodes import Both, Chars, Choice, Node, Repeat, Sequence, Special
from dgemma.constraints.utf8 import Shape, utf8

LIMIT = 20_000

_END = 0  # the state behind everything
_STATES = 5  # nondeterministic states allowed per state of the limit
_WORK = 100  # edges looked at, likewise: what bounds time and memory

_Edges: TypeAlias = tuple[tuple[int, int], ...]  # symbols, and the state to which they lead


@dataclass(frozen=True, eq=False)
class Automaton:
    """The smallest deterministic automaton of a language; states numbered breadth first.

    transitions: int32 [Q, 256 + S], the next state or -1; bytes first, then one column per special token.
    accepting: bool [Q]. specials: the S tokens. State 0 is the start, and every state has a way to an accepting one.
    """

    transitions: np.ndarray
    accepting: np.ndarray
    specials: tuple[str, ...] = ()

    def accepts(self, symbols: Iterable[int]) -> bool:
        """Whether a text, as bytes or as columns of `transitions`, is of the language."""
        state = 0
        for symbol in symbols:
            state = int(self.transitions[state, symbol])
            if state < 0:
                return False
        return bool(self.accepting[state])


def build(node: Node, limit: int = LIMIT) -> Automaton:
    """The automaton of a node.

    Raises ValueError if nothing can match, or if making it would pass `limit` states or the work that goes with them.
    """
    try:
        builder = _Builder(limit)
        found = builder.deterministic(node)
    except RecursionError:
        raise ValueError("the constraint is nested too deeply; simplify it") from None
    if found is None:
        raise ValueError("the constraint leaves no text: nothing can match")
    transitions = np.full((len(found.edges), 256 + len(builder.specials)), -1, np.int32)
    for state, edges in enumerate(found.edges):
        for target, symbols in edges.items():
            transitions[state, _columns(symbols)] = target
    return Automaton(transitions, np.array(found.accepting), tuple(builder.specials))


class _Builder:
    """A nondeterministic automaton that grows: a state has edges by symbols, and jumps, which need none."""

    def __init__(self, limit: int):
        self.limit, self.work = limit, 0
        self.edges: list[_Edges] = [()]
        self.jumps: list[tuple[int, ...]] = [()]
        self.specials: dict[str, int] = {}
        self.known: dict[tuple[_Edges, tuple[int, ...]], int] = {}
        self.begun: dict[tuple[int, int], int | None] = {}  # by the id of a node, and the state behind it
        self.chars: dict[tuple[Shape, int], int] = {}
        self.both: dict[int, Deterministic | None] = {}
        self.reached: dict[int, frozenset[int]] = {}

    def spend(self, work: int = 1) -> None:
        self.work += work
        if self.work > _WORK * self.limit or len(self.edges) > _STATES * self.limit:
            raise self.too_large()

    def too_large(self) -> ValueError:
        return ValueError(
            f"the constraint needs an automaton of more than {self.limit} states, or too much work for one; "
            "simplify it: smaller counts of repetitions, fewer alternatives, less nesting"
        )

    def add(self, edges: _Edges = (), jumps: tuple[int, ...] = ()) -> int:
        self.spend()
        self.edges.append(edges)
        self.jumps.append(jumps)
        return len(self.edges) - 1

    def state(self, edges: _Edges = (), jumps: tuple[int, ...] = ()) -> int:
        """A state with these edges and jumps, the same one every time."""
        key = edges, jumps
        if key not in self.known:
            self.known[key] = self.add(edges, jumps)
        return self.known[key]

    def before(self, node: Node, then: int) -> int | None:
        """The state from which a node leads to the state `then`; None if nothing matches the node."""
        self.spend()
        key = id(node), then
        if key not in self.begun:
            self.begun[key] = self._before(node, then)
        return self.begun[key]

    def _before(self, node: Node, then: int) -> int | None:
        match node:
            case Chars(ranges):
                shape = utf8(ranges)
                return self._chars(shape, then) if shape else None
            case Special(token):
                return self.state(((1 << 256 + self.specials.setdefault(token, len(self.specials)), then),))
            case Sequence(parts):
                at: int | None = then
                for part in reversed(parts):
                    if at is not None:
                        at = self.before(part, at)
                return at
            case Choice(options):
                entries = [self.before(option, then) for option in options]
                return self._any({entry for entry in entries if entry is not None})
            case Repeat(part, least, most):
                return self._repeat(part, least, most, then)
            case Both():
                if id(node) not in self.both:
                    self.both[id(node)] = self._both(node)
                return self._embed(self.both[id(node)], then)

    def _any(self, states: set[int]) -> int | None:
        if len(states) < 2:
            return next(iter(states), None)
        return self.state(jumps=tuple(sorted(states)))

    def _chars(self, shape: Shape, then: int) -> int:
        key = shape, then
        if key not in self.chars:
            edges = tuple((symbols, self._chars(rest, then) if rest else then) for symbols, rest in shape)
            self.chars[key] = self.state(edges)
        return self.chars[key]

    def _repeat(self, part: Node, least: int, most: int | None, then: int) -> int | None:
        at: int | None = then
        if most is None:
            at = self.add(jumps=(then,))
            again = self.before(part, at)
            if again is not None:
                self.jumps[at] = then, again
        elif most < least:
            return None
        for _ in range(0 if most is None else most - least):
            entry = None if at is None else self.before(part, at)
            at = self._any({then} if entry is None else {then, entry})
        for _ in range(least):
            at = None if at is None else self.before(part, at)
        return at

    def _both(self, node: Both) -> Deterministic | None:
        if not node.parts:
            raise ValueError("an intersection needs at least one part")
        found = self.deterministic(node.parts[0])
        for part in node.parts[1:]:
            other = self.deterministic(part) if found else None
            found = self._intersection(found, other) if found and other else None
        return found

    def _intersection(self, one: Deterministic, other: Deterministic) -> Deterministic | None:
        pairs = {(0, 0): 0}
        queue = [(0, 0)]
        edges: list[dict[int, int]] = []
        for left, right in queue:
            out: dict[int, int] = {}
            self.spend(len(one.edges[left]) * len(other.edges[right]))
            for a, symbols in one.edges[left].items():
                for b, others in other.edges[right].items():
                    if common := symbols & others:
                        if (a, b) not in pairs:
                            pairs[a, b] = len(queue)
                            queue.append((a, b))
                        out[pairs[a, b]] = common
            edges.append(out)
            if len(queue) > self.limit:
                raise self.too_large()
        found = trimmed(Deterministic(edges, [one.accepting[a] and other.accepting[b] for a, b in queue]))
        return smallest(found) if found else None

    def _embed(self, found: Deterministic | None, then: int) -> int | None:
        if found is None:
            return None
        first = len(self.edges)
        for out, accepting in zip(found.edges, found.accepting, strict=True):
            self.add(tuple((symbols, first + to) for to, symbols in out.items()), (then,) if accepting else ())
        return first

    def deterministic(self, node: Node) -> Deterministic | None:
        """The smallest deterministic automaton of a node, by subsets; None if nothing matches."""
        entry = self.before(node, _END)
        if entry is None:
            return None
        start = self._reach(entry)
        numbers = {start: 0}
        queue = [start]
        found: list[dict[int, int]] = []
        for subset in queue:
            out: dict[int, int] = defaultdict(int)
            for symbols, states in self._leaving(subset):
                target = frozenset().union(*map(self._reach, states)) if len(states) > 1 else self._reach(*states)
                if target not in numbers:
                    self.spend(len(target))
                    numbers[target] = len(queue)
                    queue.append(target)
                out[numbers[target]] |= symbols
            found.append(out)
            if len(queue) > self.limit:
                raise self.too_large()
        return smallest(Deterministic(found, [_END in subset for subset in queue]))

    def _reach(self, state: int) -> frozenset[int]:
        """The states to which jumps lead from a state, those alone from which symbols or nothing lead on."""
        if state not in self.reached:
            seen, stack = {state}, [state]
            while stack:
                for jump in self.jumps[stack.pop()]:
                    if jump not in seen:
                        seen.add(jump)
                        stack.append(jump)
            self.spend(len(seen))
            self.reached[state] = frozenset(s for s in seen if self.edges[s] or s == _END)
        return self.reached[state]

    def _leaving(self, subset: frozenset[int]) -> Iterable[tuple[int, frozenset[int]]]:
        """The edges that leave a subset: disjoint sets of symbols, and the states to which each leads."""
        targets: dict[int, frozenset[int]] = {}
        grouped: dict[int, set[int]] = defaultdict(set)
        for state in subset:
            for symbols, target in self.edges[state]:
                grouped[symbols].add(target)
            self.spend(len(self.edges[state]))
        for symbols, states in grouped.items():
            rest, pieces = symbols, {}
            for others, reached in targets.items():
                if common := others & rest:
                    pieces[common] = reached | states
                    rest ^= common
                    if others != common:
                        pieces[others ^ common] = reached
                else:
                    pieces[others] = reached
            if rest:
                pieces[rest] = frozenset(states)
            self.spend(len(pieces))
            targets = pieces
        return targets.items()


@lru_cache(4096)
def _columns(symbols: int) -> np.ndarray:
    return np.array([column for column in range(symbols.bit_length()) if symbols >> column & 1])
