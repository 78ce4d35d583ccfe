"""Sudoku as a task: what is drawn, what is held out, how answers are checked, and the bases' files."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dgemma.embedded.sudoku import rules
from dgemma.evals import tasks
from dgemma.evals.tasks import Item, sudoku
from dgemma.evals.tasks.sudoku_data import Bases, fingerprints


@dataclass
class Said:
    text: str
    reasoning: str = ""
    tool_calls: list[Any] = field(default_factory=list)


@pytest.fixture
def cached(few_bases: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(few_bases))
    sudoku._chunk.cache_clear()
    yield
    sudoku._chunk.cache_clear()


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder; two bases a chunk, the first chunk held out."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sudoku, "CHUNK", 2)
    monkeypatch.setattr(sudoku, "HELD_OUT_BASES", 2)
    monkeypatch.setattr(sudoku, "_training_bases", 2)
    sudoku._chunk.cache_clear()
    yield tmp_path / "dgemma"
    sudoku._chunk.cache_clear()


def grid(message: Any) -> tuple[int, ...]:
    return rules.parse(message["content"])


@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize("level", sudoku.LEVELS)
def test_a_drawn_puzzle_has_its_givens_and_one_solution(level: str) -> None:
    for item in tasks.items(sudoku, 3, 0, held_out=True, level=level):
        fewest, most = map(int, level.split("-"))
        assert fewest <= sum(d > 0 for d in grid(item.question[0])) <= most
        assert list(rules.solutions(grid(item.question[0]))) == [grid(item.answer)]


@pytest.mark.usefixtures("cached")
def test_unknown_levels_are_refused() -> None:
    with pytest.raises(ValueError, match="no level '20-24'; known are 45-56"):
        sudoku.draw(random.Random(0), "20-24")


@pytest.mark.usefixtures("small")
def test_no_training_puzzle_is_a_form_of_a_held_out_one() -> None:
    kinds = [tasks.items(sudoku, 12, 0, held_out, level="45-56") for held_out in (True, False)]
    solutions = [np.array([grid(item.answer) for item in kind], np.uint8) for kind in kinds]
    held_out, training = (set(fingerprints(Bases(s, s))) for s in solutions)
    assert len(held_out) == len(training) == 2
    assert not held_out & training


@pytest.mark.usefixtures("small")
def test_the_pool_grows_for_training_only() -> None:
    measured = tasks.items(sudoku, 5, 3, held_out=True, level="45-56")
    sudoku.pool(4)
    assert tasks.items(sudoku, 5, 3, held_out=True, level="45-56") == measured
    assert len({item.key for item in tasks.items(sudoku, 40, 0, held_out=False, level="45-56")}) == 4
    assert len(sudoku.training(3)) == 3
    with pytest.raises(ValueError, match="at least one base, not 0"):
        sudoku.pool(0)


def test_bases_are_made_once_and_again_if_their_file_is_damaged(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = sudoku.training(2)
    (file,) = small.iterdir()
    whole = file.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(sudoku, "_make", None)
        sudoku._chunk.cache_clear()
        assert np.array_equal(sudoku.training(2).removal, made.removal)
    for damaged in (b"", whole[:-40], whole.replace(made.solution.tobytes(), bytes(162))):
        file.write_bytes(damaged)
        sudoku._chunk.cache_clear()
        assert np.array_equal(sudoku.training(2).solution, made.solution)
        assert file.read_bytes() == whole
    assert list(small.iterdir()) == [file]


def test_answers_are_checked_by_rule() -> None:
    solved = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
    puzzle = "5300700006" + "0" * 71
    lines = lambda text: "\n".join(text[i : i + 9] for i in range(0, 81, 9))  # noqa: E731
    item = Item(({"role": "user", "content": lines(puzzle)}, {"role": "assistant", "content": lines(solved)}), "x")

    right = sudoku.check(item, Said(lines(solved) + "\n"))
    assert (right.exact, right.valid, right.parts) == (True, True, {"cells": 1.0, "clues kept": 1.0})

    # Another grid that keeps the rules and these four clues: 1 and 2 stand in no clue and change places.
    other = sudoku.check(item, Said(lines(solved.translate(str.maketrans("12", "21")))))
    assert (other.exact, other.valid) == (False, True)
    assert other.parts == {"cells": 63 / 81, "clues kept": 1.0}

    lost = sudoku.check(item, Said(lines("4" + solved[1:])))
    assert (lost.exact, lost.valid) == (False, False)
    assert lost.parts == {"cells": 80 / 81, "clues kept": 3 / 4}

    # What is missing or strange shifts nothing else.
    torn = sudoku.check(item, Said(lines("?" + solved[1:72])))
    assert not torn.valid
    assert torn.parts["cells"] == 71 / 81
    assert sudoku.check(item, Said("")).parts == {"cells": 0.0, "clues kept": 0.0}
