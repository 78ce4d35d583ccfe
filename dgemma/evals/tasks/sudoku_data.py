"""Sudoku as data: base puzzles made once, symmetries of them without end.

A base is a full grid and an order of removal: taking away its first cells, as many as wanted, leaves a puzzle with
exactly one solution. Symmetries (digits renamed, rows and columns moved within and with their bands, transposition)
make 1.2e12 puzzles of each.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dgemma.embedded.sudoku.rules import CELLS, PEERS, solutions

KEPT = 255


@dataclass(frozen=True)
class Bases:
    """solution uint8 [n, 81]; removal uint8 [n, 81]: when a cell is taken away (0 first), 255 for the last clues."""

    solution: np.ndarray
    removal: np.ndarray

    def __len__(self) -> int:
        return len(self.solution)

    @property
    def fewest(self) -> np.ndarray:
        """The smallest number of givens that each base reaches, int64 [n]."""
        return (self.removal == KEPT).sum(1)

    def __getitem__(self, index: slice | np.ndarray) -> "Bases":
        return Bases(self.solution[index], self.removal[index])


def removal_order(solution: Sequence[int], rng: random.Random) -> list[int]:
    """When each cell of a grid is taken away, as in Bases.removal: every cell in turn, unless others would fit then."""
    puzzle, removal = list(solution), [KEPT] * 81
    removed = 0
    for cell in rng.sample(list(CELLS), 81):
        digit, puzzle[cell] = puzzle[cell], 0
        others = set(range(1, 10)) - {digit} - {puzzle[p] for p in PEERS[cell]}
        if any(_solvable_with(puzzle, cell, other) for other in others):
            puzzle[cell] = digit
        else:
            removal[cell], removed = removed, removed + 1
    return removal


def _solvable_with(puzzle: list[int], cell: int, digit: int) -> bool:
    return any(True for _ in solutions([*puzzle[:cell], digit, *puzzle[cell + 1 :]]))


def fingerprints(bases: Bases) -> list[bytes]:
    """A value that all symmetric forms of a grid share; different ones prove that two grids are no forms of each other.

    Two digits make three permutations: from a unit with the first digit, over another kind of unit, to one with the
    second (rows over columns, rows over boxes, columns over boxes). Symmetries rename digits and units, which leaves
    the cycle lengths; transposition swaps the last two. They are sorted for each digit, and the digits after that.
    """
    return [min(_fingerprint(grid), _fingerprint(grid.T)) for grid in bases.solution.reshape(-1, 9, 9)]


def _fingerprint(grid: np.ndarray) -> bytes:
    rows, columns = np.divmod(np.argsort(grid, axis=None, kind="stable"), 9)
    rows, columns = rows.reshape(9, 9), columns.reshape(9, 9)  # the cells of each digit, a row of the array
    boxes = rows // 3 * 3 + columns // 3
    digits = []
    for a in range(9):
        pairs = []
        for b in set(range(9)) - {a}:
            over = ((rows, columns), (rows, boxes), (columns, boxes))
            pairs.append([_cycles(unit[a][np.argsort(via[a])][via[b]][np.argsort(unit[b])]) for unit, via in over])
        digits.append(sorted(pairs))
    return repr(sorted(digits)).encode()


def _cycles(permutation: np.ndarray) -> tuple[int, ...]:
    left, lengths = set(range(9)), []
    while left:
        at, length = left.pop(), 1
        while (at := int(permutation[at])) in left:
            left.remove(at)
            length += 1
        lengths.append(length)
    return tuple(sorted(lengths))


def puzzles(bases: Bases, givens: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A random symmetric form of each base with so many givens: (puzzle, solution), uint8 [n, 81], 0 for empty."""
    n = len(bases)
    rows, columns = _lines(n, rng), _lines(n, rng)
    cells = rows[:, :, None] * 9 + columns[:, None, :]
    cells = np.where(rng.random((n, 1, 1)) < 0.5, cells, cells.transpose(0, 2, 1)).reshape(n, 81)
    digits = np.concatenate((np.zeros((n, 1), np.uint8), rng.random((n, 9)).argsort(1).astype(np.uint8) + 1), axis=1)
    solution = np.take_along_axis(digits, np.take_along_axis(bases.solution, cells, 1).astype(np.int64), 1)
    kept = np.take_along_axis(bases.removal, cells, 1).astype(np.int64) >= (81 - givens)[:, None]
    return solution * kept, solution


def _lines(n: int, rng: np.random.Generator) -> np.ndarray:
    """Orders of nine lines that keep the bands together, int64 [n, 9]."""
    bands = rng.random((n, 3)).argsort(1)
    within = rng.random((n, 3, 3)).argsort(2)
    return (bands[:, :, None] * 3 + within).reshape(n, 9)
