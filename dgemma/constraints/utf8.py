"""Sets of characters as sets of UTF-8 bytes that follow each other."""

from collections import defaultdict
from functools import lru_cache
from typing import TypeAlias

from dgemma.constraints.nodes import LAST, Chars, complement

Ranges: TypeAlias = tuple[tuple[int, int], ...]

# Disjoint sets of bytes (bit b: byte b), and of each what follows it within a character: () behind the last byte.
Shape: TypeAlias = tuple[tuple[int, "Shape"], ...]


@lru_cache(4096)
def utf8(ranges: Ranges) -> Shape:
    """The bytes of the characters of some ranges, surrogates left out."""
    ordered = complement(complement(Chars(ranges))).ranges
    lengths = (
        (0x00, 1, ((0, 0x7F),)),
        (0xC0, 64, ((0x80, 0x7FF),)),
        (0xE0, 64**2, ((0x800, 0xD7FF), (0xE000, 0xFFFF))),
        (0xF0, 64**3, ((0x10000, LAST),)),
    )
    shape: Shape = ()
    for lead, unit, spans in lengths:
        within = [(max(low, a), min(high, b)) for a, b in spans for low, high in ordered if low <= b and high >= a]
        shape += _digits(tuple(within), lead, unit)
    return shape


@lru_cache(4096)
def _digits(ranges: Ranges, lead: int, unit: int) -> Shape:
    """Numbers as one byte, `lead` plus number // unit, and continuation bytes of six bits each for the rest."""
    if not ranges:
        return ()
    symbols: dict[Ranges, int] = defaultdict(int)
    for digit in range(ranges[0][0] // unit, ranges[-1][1] // unit + 1):
        base, top = digit * unit, digit * unit + unit - 1
        rest = tuple((max(a, base) - base, min(b, top) - base) for a, b in ranges if a <= top and b >= base)
        if rest:
            symbols[rest] |= 1 << lead + digit
    return tuple((mask, _digits(rest, 0x80, unit // 64) if unit > 1 else ()) for rest, mask in symbols.items())
