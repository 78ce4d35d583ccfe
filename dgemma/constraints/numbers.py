"""JSON numbers within bounds, as nodes: decimals of at most 15 digits, which a double holds exactly enough to compare.

An exponent is never written. Integers have no fraction and no "-0".
"""

from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from functools import cache

from dgemma.constraints.nodes import EMPTY, NOTHING, Both, Chars, Node, Repeat, choice, optional, sequence, text

DIGITS = 15

_DIGIT = Chars(((0x30, 0x39),))
_POSITIVE = Chars(((0x31, 0x39),))
_FRACTION = sequence(".", Repeat(_DIGIT, 1))
_ZEROS = sequence(".", Repeat(text("0"), 1))


@dataclass(frozen=True)
class Bound:
    """An end of an interval; `strict` if it is not part of it."""

    value: Decimal
    strict: bool = False


@cache
def number(low: Bound | None = None, high: Bound | None = None, integer: bool = False) -> Node:
    """All numbers between the bounds; a bound beyond 15 digits leaves nothing or binds nothing, as it falls."""
    above = _magnitudes(low, high, integer)
    below = _magnitudes(_negative(high), _negative(low), integer)
    if integer:
        below = Both((below, sequence(_POSITIVE, Repeat(_DIGIT))))  # no "-0"
    return choice(above, sequence("-", below))


def _negative(bound: Bound | None) -> Bound | None:
    return bound and Bound(bound.value.copy_negate(), bound.strict)


def _magnitudes(low: Bound | None, high: Bound | None, integer: bool) -> Node:
    """The numbers without a sign between the bounds."""
    largest = Decimal(10) ** DIGITS
    if (low and low.value >= largest) or (high and (high.value < 0 or (high.strict and high.value == 0))):
        return NOTHING
    parts = [_unsigned(integer)]
    if low and (low.value > 0 or (low.strict and low.value == 0)):
        low = _rounded(low, integer, ROUND_CEILING)
        parts.append(_at_least(*_digits(low.value), low.strict))
    if high and high.value < largest:
        high = _rounded(high, integer, ROUND_FLOOR)
        parts.append(_at_most(*_digits(high.value), high.strict))
    return parts[0] if len(parts) == 1 else Both(tuple(parts))


@cache
def _unsigned(integer: bool) -> Node:
    if integer:
        return choice("0", sequence(_POSITIVE, Repeat(_DIGIT, 0, DIGITS - 1)))
    more: Node = EMPTY  # what follows the digits written so far: the more of them, the shorter the fraction
    for fraction in range(1, DIGITS):
        more = choice(EMPTY, sequence(".", Repeat(_DIGIT, 1, fraction)), sequence(_DIGIT, more))
    return choice(sequence(_POSITIVE, more), sequence("0", optional(sequence(".", Repeat(_DIGIT, 1, DIGITS - 1)))))


def _rounded(bound: Bound, integer: bool, rounding: str) -> Bound:
    """The bound at the nearest number that can be written within it."""
    step = Decimal(1) if integer else Decimal(10) ** (1 - DIGITS)
    value = bound.value.quantize(step, rounding, Context(prec=3 * DIGITS))
    return bound if value == bound.value else Bound(value)


def _digits(value: Decimal) -> tuple[str, str]:
    """The digits before and behind the point of a number from 0 on (or "-0"); no zeros at the end."""
    whole, _, fraction = format(value.copy_abs(), "f").partition(".")
    return whole, fraction.rstrip("0")


def _at_least(whole: str, fraction: str, strict: bool) -> Node:
    """Decimals without needless zeros in front, from the bound on."""
    node: Node = Repeat(_DIGIT)  # behind digits that equal all of the bound's
    if strict:
        node = sequence(Repeat(text("0")), _POSITIVE, Repeat(_DIGIT))
    if fraction:
        for digit in reversed(fraction):
            node = choice(sequence(digit, node), sequence(_above(digit), Repeat(_DIGIT)))
        node = sequence(".", node)
    else:
        node = sequence(".", node) if strict else optional(_FRACTION)
    for left, digit in enumerate(reversed(whole)):
        node = choice(sequence(digit, node), sequence(_above(digit), Repeat(_DIGIT, left, left), optional(_FRACTION)))
    longer = sequence(_POSITIVE, Repeat(_DIGIT, len(whole)), optional(_FRACTION))
    return choice(node, longer)


def _at_most(whole: str, fraction: str, strict: bool) -> Node:
    """Decimals without needless zeros in front, up to the bound."""
    node: Node = NOTHING if strict else Repeat(text("0"))
    if fraction:
        for at, digit in reversed(list(enumerate(fraction))):
            less = sequence(_below(digit), Repeat(_DIGIT))
            # A fraction that ends early is less than the bound's, but a point needs a digit behind it.
            node = choice(sequence(digit, node), less, *([EMPTY] if at else []))
        node = choice(EMPTY, sequence(".", node))
    else:
        node = NOTHING if strict else optional(_ZEROS)
    for left, digit in enumerate(reversed(whole)):
        node = choice(sequence(digit, node), sequence(_below(digit), Repeat(_DIGIT, left, left), optional(_FRACTION)))
    if len(whole) == 1:
        return node
    return choice(node, sequence(Repeat(_DIGIT, 1, len(whole) - 1), optional(_FRACTION)))


def _above(digit: str) -> Chars:
    return Chars(((ord(digit) + 1, 0x39),) if digit < "9" else ())


def _below(digit: str) -> Chars:
    return Chars(((0x30, ord(digit) - 1),) if digit > "0" else ())
