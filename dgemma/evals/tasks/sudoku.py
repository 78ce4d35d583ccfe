"""Sudoku: nine lines of nine digits with 0 for empty; the answer is the solved grid in the same form.

Puzzles are symmetric forms of numbered bases, each made from a seed of its own. The first HELD_OUT_BASES are for
measuring, the others for training: base after base, random grids are drawn until the fingerprint that all symmetric
forms share is held out, or is not. So no training puzzle is a form of a measured one. A base takes 50 ms, a held-out
one 100; they are made in chunks of 100 when first needed and kept in files under $XDG_CACHE_HOME/dgemma (else
~/.cache/dgemma). Measuring makes the held-out bases and one chunk of training ones, half a minute, once; a training
that wants more variety asks for it with `pool`, which does not change the held-out puzzles of a seed.
"""

import os
import random
import tempfile
from functools import cache
from hashlib import sha256
from pathlib import Path

import numpy as np

from dgemma.embedded import sudoku
from dgemma.embedded.sudoku.rules import solutions
from dgemma.evals.tasks import Answer, Item, Score
from dgemma.evals.tasks.sudoku_data import Bases, fingerprints, puzzles, removal_order

LEVELS: tuple[str, ...] = ("45-56", "36-44", "30-35", "25-29")
"""Fewest and most givens."""

CHUNK, HELD_OUT_BASES, TRAINING_BASES = 100, 200, 2000
FIRST_SEED = 10_000_000
HELD_OUT_SHARE = 1 / 4
"""Of the draws; whoever wants only the one kind or the other passes over the rest."""

_training_bases = CHUNK


def pool(count: int = TRAINING_BASES) -> None:
    """Draws training puzzles from `count` bases from now on; `dgemma train` calls it."""
    global _training_bases
    if count < 1:
        raise ValueError(f"the pool needs at least one base, not {count}")
    _training_bases = count


def training(count: int) -> Bases:
    """The first `count` training bases."""
    return _bases(range(HELD_OUT_BASES, HELD_OUT_BASES + count))[0]


def draw(rng: random.Random, level: str) -> Item:
    """A puzzle with so many givens; held out in a quarter of the draws."""
    if level not in LEVELS:
        raise ValueError(f"Sudoku has no level {level!r}; known are {', '.join(LEVELS)}")
    fewest, most = map(int, level.split("-"))
    noise = np.random.default_rng(rng.getrandbits(64))  # one draw of `rng`, whatever the pool
    first, count = (0, HELD_OUT_BASES) if noise.random() < HELD_OUT_SHARE else (HELD_OUT_BASES, _training_bases)
    givens = noise.integers(fewest, most + 1, size=1)
    while True:
        number = first + int(noise.integers(count))
        base, (key,) = _bases(range(number, number + 1))
        if base.fewest <= givens:
            break
    asked, solved = (sudoku.lines(tuple(grid[0].tolist())) for grid in puzzles(base, givens, noise))
    messages = ({"role": "user", "content": asked}, {"role": "assistant", "content": solved})
    return Item(messages, level, key=key)


def check(item: Item, answer: Answer) -> Score:
    """exact: the solution; valid: clues kept, each digit once in every row, column and box."""
    asked, solved, got = (_cells(text) for text in (item.question[0]["content"], item.answer["content"], answer.text))
    right = [a == b for a, b in zip(solved, got, strict=True)]
    clues = [same for same, clue in zip(right, asked, strict=True) if clue != "0"]
    valid = sudoku.check(item.question[0]["content"], answer.text).right
    return Score(valid and all(right), valid, {"cells": _share(right), "clues kept": _share(clues)})


def constraint(item: Item) -> str:
    """Nine lines of nine digits in which the clues stand, as an expression."""
    return item.question[0]["content"].strip().replace("0", "[1-9]")


def _cells(text: str) -> str:
    """81 characters, a line of nine for each row; what a line lacks is blank."""
    rows = [*text.strip().splitlines(), *[""] * 9]
    return "".join(row.strip()[:9].ljust(9) for row in rows[:9])


def _share(hits: list[bool]) -> float:
    return sum(hits) / len(hits)


def _bases(numbers: range) -> tuple[Bases, list[str]]:
    """Bases by number, with their keys."""
    chunks = [_chunk(c) for c in range(numbers[0] // CHUNK, numbers[-1] // CHUNK + 1)]
    wanted = slice(numbers[0] % CHUNK, numbers[0] % CHUNK + len(numbers))
    solution, removal, keys = (np.concatenate(part)[wanted] for part in zip(*chunks, strict=True))
    return Bases(solution, removal), keys.tolist()


@cache
def _chunk(index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Solutions and removals, uint8 [100, 81], and keys [100], of bases 100 index …; from their file if it is whole."""
    path = _folder() / f"sudoku-{FIRST_SEED}-{CHUNK}-{index}.npz"
    try:
        with np.load(path) as stored:
            solution, removal, keys = stored["solution"], stored["removal"], stored["keys"]
        if solution.shape == removal.shape == (CHUNK, 81) and keys.shape == (CHUNK,):
            return solution, removal, keys
    except Exception:  # absent, or damaged, which can raise nearly anything
        pass
    made = [_make(number) for number in range(index * CHUNK, (index + 1) * CHUNK)]
    solution, removal = (np.array(part, np.uint8) for part in zip(*[m[:2] for m in made], strict=True))
    keys = np.array([m[2] for m in made])
    path.parent.mkdir(parents=True, exist_ok=True)
    # Several processes may make the same chunk at once: each writes its own file, and the last to finish stays.
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.stem, suffix=".part", delete=False) as file:
        np.savez(file, solution=solution, removal=removal, keys=keys)
    os.replace(file.name, path)
    return solution, removal, keys


def _make(number: int) -> tuple[tuple[int, ...], list[int], str]:
    rng = random.Random(FIRST_SEED + number)
    while True:
        solution = next(solutions([0] * 81, rng))
        grid = np.array([solution], np.uint8)
        key = sha256(fingerprints(Bases(grid, grid))[0]).hexdigest()
        if Item((), "", key=key).held_out == (number < HELD_OUT_BASES):
            return solution, removal_order(solution, rng), key


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dgemma"
