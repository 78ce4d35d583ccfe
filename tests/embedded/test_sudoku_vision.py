"""The model that ships and reads a Sudoku in a picture."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

import dgemma
from dgemma import embedded
from dgemma.evals import tasks
from dgemma.evals.measure import measure, summary
from dgemma.evals.tasks import sudoku_picture as task

pytest.importorskip("PIL", reason="pictures need pillow")
pytestmark = pytest.mark.skipif(
    "sudoku-vision" not in embedded.names(), reason="the model that reads pictures is not in this checkout"
)

PUZZLE = "530070000\n600195000\n098000060\n800060003\n400803001\n700020006\n060000280\n000419005\n000080079"


def test_it_reads_held_out_pictures() -> None:
    """A part of what its card measures."""
    items = tasks.items(task, 60, 7, held_out=True)
    clean, noisy, _ = summary(measure(dgemma.load("sudoku-vision", "cpu"), items, task, batch=60))
    assert clean.exact.share >= 0.95
    assert noisy.exact.share >= 0.75


def test_the_command_prints_the_grid(tmp_path: Path) -> None:
    task.render(PUZZLE, random.Random(1), noisy=False).save(tmp_path / "puzzle.png")
    command = [sys.executable, "-m", "dgemma", "run", "sudoku-vision", "--image", str(tmp_path / "puzzle.png")]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == PUZZLE
