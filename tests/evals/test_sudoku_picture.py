"""Pictures of Sudokus: one cell a soft token, the same for a seed, and answers held against the grid."""

import random
from types import SimpleNamespace
from typing import Any

import pytest

from dgemma import embedded
from dgemma.config import ModelConfig
from dgemma.evals import tasks
from dgemma.evals.tasks import sudoku_picture as task
from dgemma.media.images import fitted, picture_of
from dgemma.train.options import Recipe

pytest.importorskip("PIL", reason="pictures need pillow")

CONFIG = ModelConfig.from_file(embedded.HERE / "sudoku-vision" / "config.json")


def said(text: str) -> Any:
    return SimpleNamespace(text=text, reasoning="", tool_calls=[])


def test_a_cell_is_a_soft_token_and_a_row_of_them_a_line_of_the_answer() -> None:
    assert CONFIG.vision
    budget, side = CONFIG.vision_soft_tokens_per_image, CONFIG.vision.patch_size * CONFIG.vision.pooling_kernel_size
    size = (task.ROWS * side, task.COLUMNS * side)
    assert fitted(task.ROWS * task.SIDE, task.COLUMNS * task.SIDE, budget, CONFIG.vision) == size
    assert len("123456789\n") == task.COLUMNS


@pytest.mark.parametrize("cell", [0, 8, 40, 80])
def test_a_digit_changes_its_own_soft_token_alone(cell: int) -> None:
    assert CONFIG.vision
    grids = ["0" * cell + digit + "0" * (80 - cell) for digit in "01"]
    empty, full = (
        picture_of(
            task.render("\n".join(grid[i : i + 9] for i in range(0, 81, 9)), random.Random(3), noisy=False),
            CONFIG.vision_soft_tokens_per_image,
            CONFIG.vision,
        ).patches.astype(int)
        for grid in grids
    )
    changed = abs(empty - full).sum(1)
    assert changed.argmax() == cell // 9 * task.COLUMNS + cell % 9
    assert changed.max() > 0.95 * changed.sum()


@pytest.mark.parametrize("level", task.LEVELS)
def test_items_of_a_seed_are_equal_and_checked(level: str) -> None:
    items = tasks.items(task, 4, 0, held_out=True, level=level)
    assert items == tasks.items(task, 4, 0, held_out=True, level=level)
    for item in items:
        wanted = item.answer["content"]
        assert [len(line) for line in wanted.split("\n")] == [9] * 9
        assert task.check(item, said(wanted)).exact
        blank = task.check(item, said("\n".join(["0" * 9] * 9)))
        assert (blank.exact, blank.valid, blank.parts["clues"]) == (False, True, 0)
        assert blank.parts["cells"] == wanted.count("0") / 81
        assert not task.check(item, said(wanted[:-1])).valid
        assert not task.check(item, said("")).parts["cells"]


def test_an_unknown_level_is_named() -> None:
    with pytest.raises(ValueError, match="no level 'dark'"):
        task.draw(random.Random(0), "dark")


def test_the_recipe_ships() -> None:
    recipe = Recipe.from_toml("sudoku-vision")
    assert recipe.scratch
    assert recipe.options.vision
