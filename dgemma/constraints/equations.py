"""Languages by rules that name one another, as equations, which are solved where the language is regular.

Each rule is solved for itself, X = head X | X tail | rest giving head* rest tail*, and put into the others. What stands
inside its own solution even then nests truly, and is unrolled to a depth.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from dgemma.constraints.nodes import EMPTY, NOTHING, Choice, Node, Repeat, Sequence, Special

LIMIT = 50_000  # nodes looked at or made


@dataclass(frozen=True)
class Name(Special):
    """A rule, until what it stands for takes its place."""


def row(parts: Iterable[Node]) -> Node:
    kept = tuple(part for part in parts if part != EMPTY)
    return NOTHING if NOTHING in kept else kept[0] if len(kept) == 1 else Sequence(kept)


def either(options: Iterable[Node]) -> Node:
    kept = tuple(option for option in options if option != NOTHING)
    return kept[0] if len(kept) == 1 else Choice(kept)


def solve(body: Callable[[str], Node], start: str, depth: int) -> Node:
    """The language of a rule. `body` gives what a rule stands for, with names in it.

    Rules of which none nests in itself come out exactly; of those that do, at most `depth` uses nest.
    Raises ValueError for a rule that never ends, or not within the depth, and beyond LIMIT nodes.
    """
    put = _Put()
    bodies, found = {start: body(start)}, [start]
    for name in found:
        for used in sorted(put.names(bodies[name]) - set(bodies)):
            bodies[used] = body(used)
            found.append(used)
    known: dict[str, Node] = {}
    for name in [*reversed(found), *reversed(found)]:  # what was known too late the first time is put in the second
        if name not in known:
            bodies[name] = put.into(bodies[name], known)
            if name in put.names(bodies[name]):
                bodies[name] = _without_ends(bodies[name], name)
            if bodies[name] == NOTHING:
                raise ValueError(f"the rule {name!r} never ends")
            if name not in put.names(bodies[name]):
                known[name] = bodies[name]
    uses = {name: put.names(put.into(bodies[name], known)) for name in found if name not in known}
    while (wider := {name: used.union(*(uses[other] for other in used)) for name, used in uses.items()}) != uses:
        uses = wider
    for name in sorted(uses, key=lambda name: len(uses[name])):
        if name not in known:
            cycle = [other for other in uses if uses[other] == uses[name]]
            known |= _unroll({other: put.into(bodies[other], known) for other in cycle}, depth, put)
    return put.into(known[start], known)


def _unroll(bodies: Mapping[str, Node], depth: int, put: "_Put") -> dict[str, Node]:
    """What rules that use one another stand for when at most `depth` uses nest."""
    level: dict[str, Node] = dict.fromkeys(bodies, NOTHING)
    for _ in range(depth):
        level = {name: put.into(body, level) for name, body in bodies.items()}
    for name, node in level.items():
        if node == NOTHING:
            raise ValueError(f"the rule {name!r} cannot end within {depth} nested uses")
    return level


def _without_ends(body: Node, name: str) -> Node:
    """The solution of X = head X | X tail | rest, which is head* rest tail*, whatever else X stands in."""
    tail, rest = _split(body, name, 0, {})
    head, rest = _split(rest, name, -1, {})
    return row([_any_number(head), rest, _any_number(tail)])


def _split(node: Node, name: str, end: int, seen: dict[int, tuple[Node, Node]]) -> tuple[Node, Node]:
    """What stands beside the name where it is at the first (0) or last (-1) place, and what has it elsewhere or not."""
    if id(node) in seen:
        return seen[id(node)]
    beside: Node = NOTHING
    rest = node
    match node:
        case Name(token=token) if token == name:
            beside, rest = EMPTY, NOTHING
        case Choice(options):
            pairs = [_split(option, name, end, seen) for option in options]
            beside, rest = either(pair[0] for pair in pairs), either(pair[1] for pair in pairs)
        case Repeat(part, 0, 1):
            beside, without = _split(part, name, end, seen)
            rest = node if beside == NOTHING else either([without, EMPTY])
        case Sequence(parts) if parts:
            others = parts[1:] if end == 0 else parts[:-1]
            beside, rest = (
                row([found, *others] if end == 0 else [*others, found]) for found in _split(parts[end], name, end, seen)
            )
    seen[id(node)] = beside, rest
    return beside, rest


def _any_number(node: Node) -> Node:
    return EMPTY if node in (EMPTY, NOTHING) else Repeat(node)


def _parts(node: Node) -> tuple[Node, ...]:
    match node:
        case Sequence(parts) | Choice(parts):
            return parts
        case Repeat(part):
            return (part,)
    return ()


class _Put:
    """Puts what names stand for in their place. Nodes without names are shared and never walked again."""

    def __init__(self) -> None:
        self.made = 0
        self.closed: dict[int, Node] = {}

    def spend(self) -> None:
        self.made += 1
        if self.made > LIMIT:
            raise ValueError(f"the grammar needs more than {LIMIT} nodes; simplify it, or lower the depth")

    def names(self, node: Node) -> set[str]:
        """The names that stand in a node."""
        names, seen, waiting = set(), {id(node)}, [node]
        while waiting:
            at = waiting.pop()
            self.spend()
            if isinstance(at, Name):
                names.add(at.token)
            for part in _parts(at):
                if id(part) not in seen and id(part) not in self.closed:
                    seen.add(id(part))
                    waiting.append(part)
        return names

    def into(self, node: Node, known: Mapping[str, Node]) -> Node:
        return self._into(node, known, {})

    def _into(self, node: Node, known: Mapping[str, Node], done: dict[int, Node]) -> Node:
        if id(node) in self.closed:
            return node
        if id(node) in done:
            return done[id(node)]
        self.spend()
        match node:
            case Name(token=name):
                made = self._into(known[name], known, done) if name in known else node
            case Sequence(parts):
                made = row([self._into(part, known, done) for part in parts])
            case Choice(options):
                made = either(self._into(option, known, done) for option in options)
            case Repeat(part, least, most):
                inner = self._into(part, known, done)
                made = (EMPTY if least == 0 else NOTHING) if inner == NOTHING else Repeat(inner, least, most)
            case _:
                made = node
        if not isinstance(made, Name) and all(id(part) in self.closed for part in _parts(made)):
            self.closed[id(made)] = made
        done[id(node)] = made
        return made
