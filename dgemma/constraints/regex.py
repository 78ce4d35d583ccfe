r"""Regular expressions into nodes: the syntax that Python and ECMA-262 share, as in JSON Schema's `pattern`.

The standard library's parser reads them. \d, \w and \s are ASCII, as \d and \w are in ECMA-262; `.` is any character
but a line feed; `$` is the very end. Lazy quantifiers match what greedy ones do. What is not regular, or depends on the
characters around it, is refused by name.
"""

import re
from collections.abc import Iterable
from re import _parser as sre  # syntax trees; nothing public gives them
from typing import Any

from dgemma.constraints.nodes import ANY, EMPTY, Chars, Choice, Node, Repeat, Sequence, chars, complement

_CLASSES = {
    sre.CATEGORY_DIGIT: Chars(((48, 57),)),
    sre.CATEGORY_SPACE: chars(" \t\n\r\f\v"),
    sre.CATEGORY_WORD: Chars(((48, 57), (65, 90), (95, 95), (97, 122))),
}
_CLASSES |= {
    sre.CATEGORY_NOT_DIGIT: complement(_CLASSES[sre.CATEGORY_DIGIT]),
    sre.CATEGORY_NOT_SPACE: complement(_CLASSES[sre.CATEGORY_SPACE]),
    sre.CATEGORY_NOT_WORD: complement(_CLASSES[sre.CATEGORY_WORD]),
}
_BEGINNINGS = ((sre.AT, sre.AT_BEGINNING), (sre.AT, sre.AT_BEGINNING_STRING))
_ENDS = ((sre.AT, sre.AT_END), (sre.AT, sre.AT_END_STRING))
_REFUSED = {
    sre.AT: "an anchor that is not at an end of the pattern",
    sre.ASSERT: "lookaround",
    sre.ASSERT_NOT: "lookaround",
    sre.GROUPREF: "a backreference",
    sre.GROUPREF_EXISTS: "a conditional group",
    sre.ATOMIC_GROUP: "an atomic group",
    sre.POSSESSIVE_REPEAT: "a possessive quantifier",
}


def fullmatch(pattern: str) -> Node:
    """All texts that the pattern matches from end to end; a `^` that begins it and a `$` that ends it add nothing.

    Raises ValueError for what is invalid or not supported.
    """
    return _parse(pattern, EMPTY)


def search(pattern: str) -> Node:
    """All texts in which the pattern occurs: anywhere, or at an end where `^` or `$` ties it. Raises as `fullmatch`."""
    return _parse(pattern, Repeat(ANY))


def _parse(pattern: str, around: Node) -> Node:
    try:
        tree = sre.parse(pattern, re.ASCII)
        _check_flags(tree.state.flags)
        return _sequence(tree, around, around)
    except RecursionError:
        raise ValueError(f"the pattern {pattern[:80]!r} is nested too deeply") from None
    except (re.error, OverflowError, ValueError) as error:
        raise ValueError(f"the pattern {pattern[:80]!r} cannot be used: {error}") from None


def _sequence(tree: Iterable[Any], before: Node | None, after: Node | None) -> Node:
    """Items one after the other; `before` and `after` are what a text may have beside them.

    None: the pattern goes on there, and an anchor cannot stand there.
    """
    # The parser takes what alternatives begin with out of them, and may leave nothing but empty ones behind an anchor.
    items = [(kind, value) for kind, value in tree if kind is not sre.BRANCH or any(map(len, value[1]))]
    while before is not None and items and items[0] in _BEGINNINGS:
        items.pop(0)
        before = EMPTY
    while after is not None and items and items[-1] in _ENDS:
        items.pop()
        after = EMPTY
    if not items:
        return Sequence((before or EMPTY, after or EMPTY))
    last = len(items) - 1
    return Sequence(
        tuple(
            _item(operation, value, before if i == 0 else None, after if i == last else None)
            for i, (operation, value) in enumerate(items)
        )
    )


def _item(operation: Any, value: Any, before: Node | None, after: Node | None) -> Node:
    match operation:
        case sre.BRANCH:  # every alternative has anchors of its own
            return Choice(tuple(_sequence(option, before, after) for option in value[1]))
        case sre.SUBPATTERN:
            _, flags, _, tree = value
            _check_flags(flags)
            return _sequence(tree, before, after)
        case sre.MAX_REPEAT | sre.MIN_REPEAT:
            least, most, tree = value
            node: Node = Repeat(_sequence(tree, None, None), least, None if most is sre.MAXREPEAT else most)
        case sre.ANY:
            node = complement(chars("\n"))
        case sre.IN:
            node = _set(value)
        case sre.LITERAL | sre.NOT_LITERAL:
            node = _set([(operation, value)])
        case sre.AT if value in (sre.AT_BOUNDARY, sre.AT_NON_BOUNDARY):
            raise ValueError("a word boundary is not supported")
        case _:
            raise ValueError(f"{_REFUSED.get(operation, operation)} is not supported")
    return Sequence((before or EMPTY, node, after or EMPTY))


def _set(items: list[Any]) -> Chars:
    """A class in brackets, its ranges in order and without overlap."""
    negated, ranges = False, []
    for operation, value in items:
        match operation:
            case sre.NEGATE:
                negated = True
            case sre.LITERAL:
                ranges.append((value, value))
            case sre.NOT_LITERAL:
                ranges.extend(complement(Chars(((value, value),))).ranges)
            case sre.RANGE:
                ranges.append(value)
            case sre.CATEGORY:
                ranges.extend(_CLASSES[value].ranges)
    outside = complement(Chars(tuple(ranges)))
    return outside if negated else complement(outside)


def _check_flags(flags: int) -> None:
    """ASCII is how patterns are read, and the parser has dealt with VERBOSE; every other flag changes what matches."""
    if strange := flags & ~(re.ASCII | re.VERBOSE):
        raise ValueError(f"the flag {re.RegexFlag(strange).name} is not supported")
