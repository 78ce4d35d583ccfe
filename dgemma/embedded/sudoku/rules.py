"""The rules of Sudoku: read a puzzle, find its solutions, check an answer. No torch.

A grid is 81 digits in row order, 0 for an empty cell.
"""

import random
from collections.abc import Iterator, Sequence

EMPTY = "0._*-"

CELLS = range(81)
UNITS = tuple(
    [tuple(range(9 * r, 9 * r + 9)) for r in range(9)]
    + [tuple(range(c, 81, 9)) for c in range(9)]
    + [tuple(9 * (3 * (b // 3) + i) + 3 * (b % 3) + j for i in range(3) for j in range(3)) for b in range(9)]
)
PEERS = tuple(tuple({p for unit in UNITS if cell in unit for p in unit} - {cell}) for cell in CELLS)


def place(cell: int) -> str:
    return f"row {cell // 9 + 1}, column {cell % 9 + 1}"


def parse(text: str) -> tuple[int, ...]:
    """81 digits; 0 . _ * - mark empty cells; spaces, line breaks and the rulers | + between cells are skipped.

    Raises ValueError saying what is wrong: a strange character, a wrong count, a digit that stands twice in a unit.
    """
    lines = [line for line in text.splitlines() if set(line.strip()) - set("-+| ") or not set(line) & set("+|")]
    symbols = [c for line in lines for c in line if not c.isspace() and c != "|"]
    strange = [c for c in symbols if c not in EMPTY and c not in "123456789"]
    if strange:
        raise ValueError(f"a Sudoku has digits 1-9 and {' '.join(EMPTY)} for empty cells; {strange[0]!r} is neither")
    if len(symbols) != 81:
        raise ValueError(f"a Sudoku has 81 cells; this one has {len(symbols)}")
    grid = tuple(0 if c in EMPTY else int(c) for c in symbols)
    clash = conflict(grid)
    if clash:
        raise ValueError(f"the clues contradict each other: {clash}")
    return grid


def conflict(grid: Sequence[int]) -> str | None:
    """The first digit that stands twice in a row, column or box, in words; None if there is none."""
    for cell in CELLS:
        for peer in PEERS[cell]:
            if grid[cell] and grid[cell] == grid[peer] and cell < peer:
                return f"{grid[cell]} stands both at {place(cell)} and at {place(peer)}"
    return None


def solutions(grid: Sequence[int], rng: random.Random | None = None) -> Iterator[tuple[int, ...]]:
    """All solutions, depth first at the cell with the fewest candidates; digits in random order with `rng`."""
    candidates = [0b1111111110] * 81
    cells = list(grid)
    for cell in CELLS:
        if cells[cell]:
            for peer in PEERS[cell]:
                candidates[peer] &= ~(1 << cells[cell])
    if any(cells[c] and not candidates[c] >> cells[c] & 1 for c in CELLS):
        return
    yield from _search(cells, candidates, {c for c in CELLS if not cells[c]}, rng)


def _search(
    cells: list[int], candidates: list[int], empty: set[int], rng: random.Random | None
) -> Iterator[tuple[int, ...]]:
    if not empty:
        yield tuple(cells)
        return
    cell = min(empty, key=lambda c: candidates[c].bit_count())
    digits = [d for d in range(1, 10) if candidates[cell] >> d & 1]
    if rng:
        rng.shuffle(digits)
    empty.remove(cell)
    for digit in digits:
        changed = [p for p in PEERS[cell] if p in empty and candidates[p] >> digit & 1]
        if all(candidates[p] != 1 << digit for p in changed):
            for p in changed:
                candidates[p] ^= 1 << digit
            cells[cell] = digit
            yield from _search(cells, candidates, empty, rng)
            for p in changed:
                candidates[p] |= 1 << digit
    cells[cell] = 0
    empty.add(cell)


def check(puzzle: Sequence[int], answer: Sequence[int]) -> str | None:
    """What is wrong with an answer to a puzzle, in words; None if it is right."""
    if len(answer) != 81:
        return f"the answer has {len(answer)} cells, not 81"
    for cell in CELLS:
        if answer[cell] not in range(1, 10):
            return f"{place(cell)} is not a digit from 1 to 9"
        if puzzle[cell] and puzzle[cell] != answer[cell]:
            return f"the clue {puzzle[cell]} at {place(cell)} became {answer[cell]}"
    return conflict(answer)
