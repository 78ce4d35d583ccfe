"""A Sudoku in a picture: read it into nine lines of nine digits, 0 for an empty cell.

A picture is ten cells wide and nine high, the grid at its left: cut into 9 × 10 soft tokens, each shows one cell, and a
row of them is as long as a line of the answer with its line break. Puzzles and what is held out are those of `sudoku`.
"""

import base64
import io
import random
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgemma.evals.tasks import Answer, Item, Score, sudoku
from dgemma.media import needed

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

LEVELS: tuple[str, ...] = ("clean", "noisy")
SIDE = 24
"""Pixels of a cell."""
ROWS, COLUMNS = 9, 10
"""Cells of a picture."""
TRUETYPE = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono", "STIXGeneral", "STIXGeneralBol")
"""Fonts that matplotlib brings; without it there is pillow's own alone."""


def draw(rng: random.Random, level: str) -> Item:
    """A puzzle of any number of givens. ValueError for a level that there is not."""
    if level not in LEVELS:
        raise ValueError(f"a Sudoku picture has no level {level!r}; known are {', '.join(LEVELS)}")
    puzzle = sudoku.draw(rng, rng.choice(sudoku.LEVELS))
    asked = puzzle.question[0]["content"].strip()
    image = render(asked, rng, noisy=level == "noisy")
    messages = ({"role": "user", "content": [_part(image)]}, {"role": "assistant", "content": asked})
    return Item(messages, level, key=puzzle.key)


def check(item: Item, answer: Answer) -> Score:
    """exact: every cell; valid: nine lines of nine digits; cells, clues: shares that are right, of all and of clues."""
    wanted, said = (text.strip().split("\n") for text in (item.answer["content"], answer.text))
    valid = len(said) == 9 and all(len(line) == 9 and set(line) <= set("0123456789") for line in said)
    got = "".join(line[:9].ljust(9) for line in [*said, *[""] * 9][:9])
    pairs = list(zip("".join(wanted), got, strict=True))
    clues = [a == b for a, b in pairs if a != "0"]
    cells = sum(a == b for a, b in pairs) / 81
    return Score(said == wanted, valid, {"cells": cells, "clues": sum(clues) / len(clues)})


def constraint(item: Item) -> str:
    return r"[0-9]{9}(\n[0-9]{9}){8}"


def render(puzzle: str, rng: random.Random, noisy: bool) -> "Image":
    """Nine lines of nine digits as a picture of its own font, colours and lines, dark on light or light on dark.

    noisy: tilted by up to 1.5°, a cell's digit a twelfth of the cell out of place, on a ground of faint noise.
    """
    pillow, drawing = needed("PIL.Image"), needed("PIL.ImageDraw")
    ground = tuple(rng.randrange(190, 256) for _ in range(3))
    ink, rule = (tuple(rng.randrange(0, most) for _ in range(3)) for most in (90, 130))
    if rng.random() < 0.3:
        ground, ink, rule = ink, ground, tuple(255 - c for c in rule)
    image = pillow.new("RGB", (SIDE * COLUMNS, SIDE * ROWS), ground)
    pen = drawing.Draw(image)
    thin, thick = rng.choice(((1, 2), (1, 3), (0, 2)))
    for i in range(10):
        width = thick if i % 3 == 0 else thin
        at = min(max(SIDE * i, width // 2), SIDE * ROWS - 1 - width // 2) if i in (0, 9) else SIDE * i
        if width:
            pen.line((at, 0, at, SIDE * ROWS), rule, width)
            pen.line((0, at, SIDE * 9, at), rule, width)
    font = _font(rng.choice(_fonts()), rng.randrange(15, 20))
    drift = 2 if noisy else 0
    for i, digit in enumerate(puzzle.replace("\n", "")):
        if digit != "0":
            x, y = (SIDE * (k + 0.5) + rng.randint(-drift, drift) for k in (i % 9, i // 9))
            pen.text((x, y), digit, ink, font=font, anchor="mm")
    if not noisy:
        return image
    tilted = image.rotate(rng.uniform(-1.5, 1.5), pillow.Resampling.BILINEAR, fillcolor=ground)
    speckle = pillow.frombytes("L", image.size, rng.randbytes(image.width * image.height)).convert("RGB")
    return pillow.blend(tilted, speckle, rng.uniform(0, 0.15))


@cache
def _fonts() -> tuple[str, ...]:
    """Pillow's own font, "", and the files of matplotlib's."""
    try:
        import matplotlib
    except ImportError:
        return ("",)
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ("", *(str(file) for name in TRUETYPE if (file := folder / f"{name}.ttf").exists()))


@lru_cache(maxsize=100)
def _font(file: str, size: int) -> "FreeTypeFont":
    fonts = needed("PIL.ImageFont")
    return fonts.truetype(file, size) if file else fonts.load_default(size)


def _part(image: "Image") -> dict[str, Any]:
    """As text, so that an item can be written to a file."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    data = base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
