"""A place to write to: settled text that stays and, on a terminal, a region below it that is redrawn."""

import os
import sys
from collections.abc import Iterable, Sequence
from typing import TextIO

from dgemma.terminal.layout import Piece, Row, Style, cells, clean, paint, wrap

CLEAR_LINE, CLEAR_BELOW = "\x1b[K", "\x1b[J"


class Screen:
    """`tty`: a person reads it; `live`: it also obeys cursor movements; `colour`: NO_COLOR does not forbid it."""

    def __init__(self, out: TextIO):
        self.out = out
        self.tty = out.isatty()
        # A POSIX terminal that does not say what it is can do nothing; Windows never says.
        self.live = self.tty and os.environ.get("TERM", "dumb" if os.name == "posix" else "") != "dumb"
        self.colour = self.live and not os.environ.get("NO_COLOR")
        self._drawn: list[int] = []  # cells of the region's rows
        self._line_open = False

    @property
    def size(self) -> tuple[int, int]:
        """Columns and rows, now."""
        try:
            columns, rows = os.get_terminal_size(self.out.fileno())
        except OSError:
            columns, rows = 0, 0
        return columns or 80, rows or 24

    def show(self, settled: Iterable[Piece], region: Sequence[Row] = ()) -> None:
        """Writes at once: settled text in place of the old region, and the new region below it.

        The region's last row must leave its last cell free. Text for no terminal is passed on as it is.
        """
        pieces = [(clean(text) if self.tty else text, style) for text, style in settled if text]
        if pieces:
            self._line_open = not pieces[-1][0].endswith("\n")
        text = self._erased() + (paint(pieces, self.colour) if self.live else "".join(text for text, _ in pieces))
        if region:
            drawn = [paint(((c.text, c.style) for c in row), self.colour) for row in region]
            text += "\n".join(CLEAR_LINE + row for row in drawn) + CLEAR_BELOW
            self._drawn = [cells("".join(c.text for c in row)) for row in region]
        if text:
            self.out.write(text)
            self.out.flush()

    def end_line(self) -> None:
        """Ends the line that settled text has left open, if any."""
        if self._line_open:
            self.show([("\n", Style.PLAIN)])

    def _erased(self) -> str:
        """Moves to the region's first cell and clears it. A terminal made narrower has wrapped the rows meanwhile."""
        if not self._drawn:
            return ""
        columns, _ = self.size
        rows = sum(max(1, -(-width // columns)) for width in self._drawn) - 1
        self._drawn = []
        return "\x1b[0m\r" + (f"\x1b[{rows}A" if rows else "") + CLEAR_BELOW


def note(message: str, *, faint: bool = False) -> None:
    """A line beside the answer, on standard error; wrapped at words where that is a terminal."""
    sys.stdout.flush()
    screen = Screen(sys.stderr)
    if screen.tty:
        rows = wrap([(message, Style.PLAIN)], screen.size[0])
        message = "\n".join("".join(cluster.text for cluster in row) for row in rows)
    screen.show([(message, Style.FAINT if faint else Style.PLAIN), ("\n", Style.PLAIN)])
