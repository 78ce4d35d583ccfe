"""Sudoku as data: puzzles with one solution, forms that stay Sudokus."""

import numpy as np
import pytest

from dgemma.embedded.sudoku import rules
from dgemma.evals.tasks.sudoku_data import Bases, draw, fingerprints, make_bases, puzzles


@pytest.fixture(scope="module")
def bases() -> Bases:
    return make_bases(12, seed=5)


@pytest.mark.parametrize("givens", [30, 45])
def test_every_form_of_a_puzzle_has_one_solution(bases: Bases, givens: int) -> None:
    puzzle, solution = puzzles(bases, np.full(len(bases), givens), np.random.default_rng(givens))
    for asked, answer in zip(puzzle.tolist(), solution.tolist(), strict=True):
        assert sum(d > 0 for d in asked) == givens
        assert list(rules.solutions(asked)) == [tuple(answer)]


def test_fingerprints_survive_symmetries_and_tell_grids_apart(bases: Bases) -> None:
    _, other = puzzles(bases, np.full(len(bases), 81), np.random.default_rng(1))
    assert not np.array_equal(other, bases.solution)
    assert fingerprints(Bases(other, bases.removal)) == fingerprints(bases)
    assert len(set(fingerprints(bases))) == len(bases)


def test_drawn_batches_keep_to_the_givens(bases: Bases) -> None:
    puzzle, solution = next(draw(bases, 64, (36, 40), seed=0))
    counts = (puzzle > 0).sum(1)
    assert counts.min() >= 36
    assert counts.max() <= 40
    assert len(np.unique(solution, axis=0)) == 64
