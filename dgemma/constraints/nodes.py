"""Regular languages as trees: what schemas, expressions and grammars become, and what automata are made from."""

from dataclasses import dataclass
from typing import TypeAlias

LAST = 0x10FFFF


@dataclass(frozen=True)
class Chars:
    """One character of a set: ranges of code points, both ends included. No ranges: nothing matches."""

    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Special:
    """One special token of the tokenizer, by its text; characters that spell it are not it."""

    token: str


@dataclass(frozen=True)
class Sequence:
    """The parts one after the other; no parts: the empty text."""

    parts: tuple["Node", ...]


@dataclass(frozen=True)
class Choice:
    """Any one of the options; no options: nothing matches."""

    options: tuple["Node", ...]


@dataclass(frozen=True)
class Repeat:
    """The part, `least` to `most` times; None: any number of times."""

    part: "Node"
    least: int = 0
    most: int | None = None


@dataclass(frozen=True)
class Both:
    """What all of the parts match."""

    parts: tuple["Node", ...]


Node: TypeAlias = Chars | Special | Sequence | Choice | Repeat | Both

EMPTY = Sequence(())
NOTHING = Choice(())


def text(characters: str) -> Node:
    """Exactly these characters."""
    return Sequence(tuple(Chars(((ord(c), ord(c)),)) for c in characters))


def sequence(*parts: Node | str) -> Node:
    """Nodes and texts one after the other."""
    return Sequence(tuple(text(part) if isinstance(part, str) else part for part in parts))


def choice(*options: Node | str) -> Node:
    """Any one of some nodes and texts."""
    return Choice(tuple(text(option) if isinstance(option, str) else option for option in options))


def optional(part: Node | str) -> Node:
    return Repeat(text(part) if isinstance(part, str) else part, 0, 1)


def chars(characters: str) -> Chars:
    """One of these characters."""
    return Chars(tuple((ord(c), ord(c)) for c in sorted(set(characters))))


def complement(node: Chars) -> Chars:
    """Every other character; surrogates, which are none, never count."""
    found: list[tuple[int, int]] = []
    at = 0
    for low, high in [*sorted(node.ranges), (LAST + 1, LAST + 1)]:
        if at < low:
            found.append((at, low - 1))
        at = max(at, high + 1)
    return Chars(tuple(found))


ANY = complement(Chars(()))
