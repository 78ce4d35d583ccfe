"""Styled text for a terminal: characters that do no harm, their widths in cells, rows that fit."""

from collections.abc import Iterable, Iterator
from enum import Enum
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple
from unicodedata import category

from rich.cells import get_character_cell_size

TAB = 8
ZWJ, EMOJI_STYLE = "\u200d", "\ufe0f"
SKIN_TONES = range(0x1F3FB, 0x1F400)
FLAG_LETTERS = range(0x1F1E6, 0x1F200)


class Style(Enum):
    """How a piece of text looks: SGR codes with colour, and without."""

    PLAIN = "", ""
    FAINT = "2", "2"
    ACCEPTED = "32", "1"
    CHANGED = "33", "4"
    RENOISED = "2;35", "2"


Piece = tuple[str, Style]


class Cluster(NamedTuple):
    """Characters that are drawn as one, and the cells they take at most."""

    text: str
    style: Style
    cells: int


Row = list[Cluster]

_HARMLESS: dict[int, str | None] = {
    **{code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"},
    127: "\u2421",
    **dict.fromkeys(range(0x80, 0xA0), "\ufffd"),
    **dict.fromkeys((0x2028, 0x2029), "\n"),
    # These reorder what stands around them, up to a whole line.
    **dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x206A))),
}


def clean(text: str) -> str:
    """Text without control characters: escape becomes "␛" and so on; line breaks and tabs stay."""
    return text.replace("\r\n", "\n").translate(_HARMLESS)


def cells(text: str) -> int:
    """Cells of a text at most. Terminals differ on emoji sequences; a row that ends too early is none the worse."""
    return sum(map(_cells, text))


@lru_cache(4096)
def _cells(character: str) -> int:
    if ord(character) in SKIN_TONES or ord(character) in FLAG_LETTERS:
        return 2
    if character == EMOJI_STYLE or category(character) == "Mc":
        return 1
    return get_character_cell_size(character)


def clusters(pieces: Iterable[Piece]) -> Iterator[Cluster]:
    """Cleaned pieces, character by character; combining ones stay with their base, also from another piece."""
    held: Cluster | None = None
    for text, style in pieces:
        for character in clean(text):
            width = _cells(character)
            if held and _joins(held.text, character):
                held = Cluster(held.text + character, held.style, held.cells + width)
                continue
            if held:
                yield held
            held = Cluster(character, style, max(1, width))  # a combining one without a base may be given a blank
    if held:
        yield held


def _joins(before: str, character: str) -> bool:
    if before in "\n\t" or character in "\n\t":
        return False
    return before.endswith(ZWJ) or ord(character) in SKIN_TONES or get_character_cell_size(character) == 0


def wrap(pieces: Iterable[Piece], columns: int) -> list[Row]:
    """Rows of at most `columns` cells, broken at blanks and beside wide characters, else where the row is full.

    A blank that does not fit is where the row ends, and is dropped. What no row could hold becomes "\ufffd".
    """
    rows: list[Row] = []
    row: Row = []
    used = breakable = 0
    for cluster in clusters(pieces):
        blank, wide = cluster.text.isspace(), cluster.cells > 1
        if cluster.text == "\t":
            cluster = Cluster(" " * (TAB - used % TAB), cluster.style, TAB - used % TAB)
        elif cluster.cells > columns:
            cluster = Cluster("\ufffd", cluster.style, 1)
        overflows = used + cluster.cells > columns
        if cluster.text == "\n" or (blank and overflows):
            rows.append(row)
            row, used, breakable = [], 0, 0
            continue
        if wide and not blank:
            breakable = len(row)
        while row and used + cluster.cells > columns:
            at = breakable or len(row)
            rows.append(row[:at])
            row, breakable = row[at:], 0
            used = sum(c.cells for c in row)
        row.append(cluster)
        used += cluster.cells
        if blank or wide:
            breakable = len(row)
    return [*rows, row]


def flow(parts: Iterable[str], columns: int, between: str = " · ") -> list[str]:
    """Short texts side by side, as many in a row as fit; one that is too long for any row is cut."""
    rows: list[str] = []
    for part in parts:
        joined = f"{rows[-1]}{between}{part}" if rows else part
        if rows and cells(joined) <= columns:
            rows[-1] = joined
        else:
            rows.append("".join(c.text for c in wrap([(part, Style.PLAIN)], columns)[0]))
    return rows


def paint(pieces: Iterable[Piece], colour: bool) -> str:
    """Text with SGR codes; each run of a style is closed, so that no style outlives a row."""
    painted = []
    for style, run in groupby(pieces, key=lambda piece: piece[1]):
        text = "".join(piece[0] for piece in run)
        code = style.value[0 if colour else 1]
        painted.append(f"\x1b[{code}m{text}\x1b[0m" if code and text else text)
    return "".join(painted)
