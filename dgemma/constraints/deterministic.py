"""Deterministic automata over sets of symbols, and the smallest one of a language."""

from collections import defaultdict
from dataclasses import dataclass


@dataclass(frozen=True)
class Deterministic:
    """Of each state, the next states and the symbols that lead there: an int whose bit b stands for symbol b.

    The symbols of a state are disjoint. State 0 is the start.
    """

    edges: list[dict[int, int]]
    accepting: list[bool]

    def sources(self) -> list[list[int]]:
        """The states just before each state."""
        found: list[list[int]] = [[] for _ in self.edges]
        for state, out in enumerate(self.edges):
            for target in out:
                found[target].append(state)
        return found


def trimmed(automaton: Deterministic) -> Deterministic | None:
    """Without edges to states that have no way to an accepting one; None if the start is such a state."""
    sources = automaton.sources()
    stack = [state for state, accepts in enumerate(automaton.accepting) if accepts]
    alive = set(stack)
    while stack:
        fresh = [source for source in sources[stack.pop()] if source not in alive]
        alive.update(fresh)
        stack.extend(fresh)
    if 0 not in alive:
        return None
    edges = [{target: symbols for target, symbols in out.items() if target in alive} for out in automaton.edges]
    return Deterministic(edges, automaton.accepting)


def smallest(automaton: Deterministic) -> Deterministic:
    """The states that the start reaches, equal ones made one, numbered breadth first in the order of symbols.

    Each of them must have a way to an accepting state (see `trimmed`). Blocks are split until the states of each have
    the same symbols to the same blocks. The largest piece of a block keeps its number, and only states just before the
    other pieces are looked at again: n log n in all.
    """
    sources = automaton.sources()
    block = [int(accepts) for accepts in automaton.accepting]
    blocks = [{state for state, number in enumerate(block) if number == accepts} for accepts in (0, 1)]
    dirty = set(range(len(block)))
    while dirty:
        touched: dict[int, list[int]] = defaultdict(list)
        for state in dirty:
            touched[block[state]].append(state)
        moves = [
            (number, piece)
            for number, states in touched.items()
            for piece in _pieces(automaton, block, blocks[number], states)
        ]
        dirty = set()
        for number, piece in moves:
            blocks[number].difference_update(piece)
            for state in piece:
                block[state] = len(blocks)
                dirty.update(sources[state])
            blocks.append(set(piece))
    return _numbered(automaton, block)


def _pieces(automaton: Deterministic, block: list[int], members: set[int], states: list[int]) -> list[list[int]]:
    """What must leave a block: all but the largest set of members that are alike.

    `states` have a next state in a new block; the other members have none, so they are alike, and like none of these.
    """
    alike: dict[frozenset[tuple[int, int]], list[int]] = defaultdict(list)
    for state in states:
        alike[frozenset(_leaving(automaton, block, state).items())].append(state)
    pieces = sorted(alike.values(), key=len)
    largest = pieces.pop()
    others = len(members) - len(states)
    if others >= len(largest):
        pieces.append(largest)
    elif others:
        pieces.append([*members.difference(states)])
    return pieces


def _leaving(automaton: Deterministic, block: list[int], state: int) -> dict[int, int]:
    """The symbols from a state to each block."""
    found: dict[int, int] = defaultdict(int)
    for target, symbols in automaton.edges[state].items():
        found[block[target]] |= symbols
    return found


def _numbered(automaton: Deterministic, block: list[int]) -> Deterministic:
    """The blocks as states, in the order in which they are reached."""
    numbers = {block[0]: 0}
    queue = [0]  # a state of each block
    edges: list[dict[int, int]] = []
    example = {number: state for state, number in enumerate(block)}
    for state in queue:
        out = _leaving(automaton, block, state)
        for number in sorted(out, key=lambda number: out[number] & -out[number]):
            if number not in numbers:
                numbers[number] = len(queue)
                queue.append(example[number])
        edges.append({numbers[number]: symbols for number, symbols in out.items()})
    return Deterministic(edges, [automaton.accepting[state] for state in queue])
