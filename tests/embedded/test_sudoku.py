"""The rules of Sudoku, and the model that ships with the package."""

import random

import numpy as np
import pytest

import dgemma
from dgemma import embedded
from dgemma.embedded import sudoku
from dgemma.embedded.sudoku import rules
from dgemma.evals.measure import measure, summary
from dgemma.evals.tasks import Item
from dgemma.evals.tasks import sudoku as task
from dgemma.evals.tasks.sudoku_data import Bases, puzzles, removal_order

PUZZLE = "530070000600195000098000060800060003400803001700020006060000280000419005000080079"
SOLVED = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"


@pytest.mark.parametrize(
    "text",
    [
        PUZZLE,
        PUZZLE.replace("0", "."),
        " ".join(PUZZLE.replace("0", "_")),
        "\n".join(PUZZLE[i : i + 9] for i in range(0, 81, 9)) + "\n",
        "\n------+-------+------\n".join(
            "\n".join(
                f"{PUZZLE[r : r + 3]}|{PUZZLE[r + 3 : r + 6]}|{PUZZLE[r + 6 : r + 9]}" for r in range(b, b + 27, 9)
            )
            for b in range(0, 81, 27)
        ),
    ],
)
def test_common_notations_are_one_puzzle(text: str) -> None:
    assert "".join(map(str, rules.parse(text))) == PUZZLE
    assert sudoku.prepare(text).replace("\n", "") == PUZZLE


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PUZZLE[:-1], "81 cells; this one has 80"),
        (PUZZLE + "1", "81 cells; this one has 82"),
        ("", "has 0"),
        ("a" + PUZZLE[1:], "'a' is neither"),
        ("55" + PUZZLE[2:], "5 stands both at row 1, column 1 and at row 1, column 2"),
        ("5" * 81, "contradict each other"),
        # No two clues clash, yet the corner cell has no digit left.
        ("012345678" + "9" + "0" * 71, "no solution"),
    ],
)
def test_what_is_no_puzzle_is_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sudoku.prepare(text)


def test_all_solutions_are_found() -> None:
    assert list(rules.solutions(rules.parse(PUZZLE))) == [tuple(map(int, SOLVED))]
    # A rectangle of two digits in two bands, taken away, can be filled in two ways.
    grid = [int(d) for d in SOLVED]
    four = next(
        (9 * r + a, 9 * r + b, 9 * s + a, 9 * s + b)
        for r in range(9)
        for s in range(r + 1, 9)
        for a in range(9)
        for b in range(a + 1, 9)
        if grid[9 * r + a] == grid[9 * s + b]
        and grid[9 * r + b] == grid[9 * s + a]
        and (r // 3 == s // 3 or a // 3 == b // 3)
    )
    for cell in four:
        grid[cell] = 0
    assert len(set(rules.solutions(grid))) == 2
    assert rules.check([0] * 81, next(rules.solutions([0] * 81, random.Random(3)))) is None


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (SOLVED[:-1], "80 cells"),
        ("0" + SOLVED[1:], "row 1, column 1 is not a digit"),
        ("9" + SOLVED[1:], "the clue 5 at row 1, column 1 became 9"),
        (SOLVED[:2] + "6" + SOLVED[3:], "6 stands both at row 1, column 3"),
        (SOLVED[:-1] + "x", "holds 'x'"),
    ],
)
def test_a_wrong_answer_is_named(answer: str, reason: str) -> None:
    verdict = sudoku.check(PUZZLE, answer)
    assert not verdict.right
    assert reason in verdict.reason


def test_the_solution_is_right() -> None:
    assert sudoku.check(PUZZLE, SOLVED).right


@pytest.mark.skipif("sudoku" not in embedded.names(), reason="the Sudoku model is not in this checkout")
def test_the_embedded_model_solves_held_out_puzzles() -> None:
    """A part of what its card measures: 60 puzzles of each of two kinds."""
    rng = np.random.default_rng(0)
    made = random.Random(1_000_001)
    grids = [next(rules.solutions([0] * 81, made)) for _ in range(40)]
    removals = [removal_order(grid, made) for grid in grids]
    bases = Bases(np.array(grids, np.uint8), np.array(removals, np.uint8))[np.arange(60) % 40]
    items = []
    for level in task.LEVELS[:2]:
        fewest, most = map(int, level.split("-"))
        for pair in zip(*puzzles(bases, rng.integers(fewest, most + 1, size=60), rng), strict=True):
            asked, solved = (sudoku.lines(tuple(grid.tolist())) for grid in pair)
            items.append(Item(({"role": "user", "content": asked}, {"role": "assistant", "content": solved}), level))
    easy, hard, _ = summary(measure(dgemma.load("sudoku"), items, task, batch=60))
    assert easy.exact.share >= 0.95
    assert hard.exact.share >= 0.6
