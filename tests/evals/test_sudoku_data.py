"""Sudoku as data: puzzles with one solution, forms that stay Sudokus."""

import random

import numpy as np
import pytest

from dgemma.embedded.sudoku import rules
from dgemma.evals.tasks.sudoku_data import Bases, fingerprints, puzzles, removal_order


@pytest.fixture(scope="module")
def bases() -> Bases:
    rng = random.Random(5)
    grids = [next(rules.solutions([0] * 81, rng)) for _ in range(12)]
    return Bases(np.array(grids, np.uint8), np.array([removal_order(grid, rng) for grid in grids], np.uint8))


def exact_covers(puzzle: list[int], most: int = 2) -> list[list[int]]:
    """Solutions by Knuth's Algorithm X, which shares nothing with the project's own solver but the rules."""
    wanted = {}
    for cell in range(81):
        row, column = divmod(cell, 9)
        for digit in [puzzle[cell]] if puzzle[cell] else range(1, 10):
            places = (("cell", cell), ("row", row, digit), ("column", column, digit))
            wanted[cell, digit] = [*places, ("box", row // 3 * 3 + column // 3, digit)]
    covers: dict = {}
    for choice, constraints in wanted.items():
        for constraint in constraints:
            covers.setdefault(constraint, set()).add(choice)

    def search(chosen: list) -> None:
        if len(found) == most or not covers:
            if not covers:
                found.append([digit for _, digit in sorted(chosen)])
            return
        for choice in list(covers[min(covers, key=lambda c: len(covers[c]))]):
            removed = []
            for constraint in wanted[choice]:
                for other in covers[constraint]:
                    for theirs in wanted[other]:
                        if theirs != constraint:
                            covers[theirs].discard(other)
                removed.append(covers.pop(constraint))
            search([*chosen, choice])
            for constraint in reversed(wanted[choice]):
                covers[constraint] = removed.pop()
                for other in covers[constraint]:
                    for theirs in wanted[other]:
                        if theirs != constraint:
                            covers[theirs].add(other)

    found: list[list[int]] = []
    search([])
    return found


@pytest.mark.parametrize("givens", [0, 30, 36, 45])
def test_every_form_of_a_puzzle_has_one_solution(bases: Bases, givens: int) -> None:
    """`givens` 0: as few as each base allows, 22 to 27."""
    counts = np.full(len(bases), givens) if givens else bases.fewest
    puzzle, solution = puzzles(bases, counts, np.random.default_rng(givens))
    for asked, answer, count in zip(puzzle.tolist(), solution.tolist(), counts, strict=True):
        assert sum(d > 0 for d in asked) == count
        assert exact_covers(asked) == [answer]
        assert list(rules.solutions(asked)) == [tuple(answer)]


def test_the_independent_solver_finds_second_solutions(bases: Bases) -> None:
    """Without the clues of two digits these can change places."""
    solved = bases.solution[0].tolist()
    found = exact_covers([0 if digit in (1, 2) else digit for digit in solved], most=1000)
    assert solved in found
    assert [{1: 2, 2: 1}.get(digit, digit) for digit in solved] in found


def test_fingerprints_survive_symmetries_and_tell_grids_apart(bases: Bases) -> None:
    _, other = puzzles(bases, np.full(len(bases), 81), np.random.default_rng(1))
    assert not np.array_equal(other, bases.solution)
    assert fingerprints(Bases(other, bases.removal)) == fingerprints(bases)
    assert len(set(fingerprints(bases))) == len(bases)
