"""The Sudoku model's task: puzzles in, nine lines of nine digits out."""

from dgemma.embedded import Verdict
from dgemma.embedded.sudoku import rules


def prepare(text: str) -> str:
    """A puzzle of 81 cells in any common notation, as nine lines of digits with 0 for empty.

    Raises ValueError if the text is no puzzle, contradicts itself or has no solution.
    """
    grid = rules.parse(text)
    if next(rules.solutions(grid), None) is None:
        raise ValueError("this Sudoku has no solution: no digits fit all of its clues")
    return lines(grid)


def check(prompt: str, answer: str) -> Verdict:
    """Whether an answer keeps the clues and has every digit once in each row, column and box."""
    digits = [int(c) for c in answer if c in "0123456789"]
    strange = set(answer) - set("0123456789 \n")
    wrong = f"it holds {min(strange)!r}" if strange else rules.check(rules.parse(prompt), digits)
    if wrong:
        return Verdict(False, wrong)
    return Verdict(True, "every row, column and box has the digits 1 to 9, and all clues are kept")


def lines(grid: tuple[int, ...]) -> str:
    """Nine lines of nine digits."""
    return "\n".join("".join(map(str, grid[row : row + 9])) for row in range(0, 81, 9))
