"""Digits in a picture: read them from left to right. The smallest task that a model cannot do without looking."""

import base64
import io
import random
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from dgemma.evals.tasks import Answer, Item, Score
from dgemma.media import needed

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

LEVELS = ("one", "three", "six")
COUNTS = dict(zip(LEVELS, (1, 3, 6), strict=True))
QUESTIONS = (
    "Which digits are in the picture, from left to right?",
    "Read the digits.",
    "What number is written here, digit by digit?",
)
SIDE = 48
"""Pixels that each digit has room for; at a budget of one soft token for 48 × 48, about one token."""


def draw(rng: random.Random, level: str) -> Item:
    digits = [rng.randrange(10) for _ in range(COUNTS[level])]
    parts = [_part(render(digits, rng)), {"type": "text", "text": rng.choice(QUESTIONS)}]
    answer = {"role": "assistant", "content": " ".join(map(str, digits))}
    return Item(({"role": "user", "content": parts}, answer), level, facts={"digits": digits})


def check(item: Item, answer: Answer) -> Score:
    """exact: all of them; valid: as many digits as there are, and nothing else; digits: the share that is right."""
    wanted, said = item.facts["digits"], answer.text.split()
    valid = len(said) == len(wanted) and all(len(word) == 1 and word.isdecimal() for word in said)
    right = sum(a == str(b) for a, b in zip(said, wanted, strict=False)) / len(wanted)
    return Score(valid and right == 1, valid, {"digits": right})


def constraint(item: Item) -> str:
    return r"[0-9]( [0-9])" + f"{{{len(item.facts['digits']) - 1}}}"


def render(digits: list[int], rng: random.Random) -> "Image":
    """Digits of their own sizes, places and tilts, dark on light or light on dark, on a ground of faint noise."""
    pillow, drawing = needed("PIL.Image"), needed("PIL.ImageDraw")
    ground = [rng.randrange(170, 256) for _ in range(3)]
    ink = [rng.randrange(0, 90) for _ in range(3)]
    if rng.random() < 0.5:
        ground, ink = ink, ground
    width = SIDE * max(2, len(digits))
    image = pillow.new("RGB", (width, SIDE), tuple(ground))
    for i, digit in enumerate(digits):
        size = rng.randrange(28, 44)
        stamp = pillow.new("L", (SIDE, SIDE))
        drawing.Draw(stamp).text((SIDE / 2, SIDE / 2), str(digit), 255, font=_font(size), anchor="mm")
        stamp = stamp.rotate(rng.uniform(-15, 15), resample=pillow.Resampling.BILINEAR)
        left = (width - SIDE * len(digits)) // 2 + SIDE * i
        at = (left + rng.randint(-4, 4), rng.randint(-4, 4))
        image.paste(tuple(ink), (at[0], at[1], at[0] + SIDE, at[1] + SIDE), stamp)
    speckle = pillow.frombytes("RGB", image.size, rng.randbytes(3 * width * SIDE))
    return pillow.blend(image, speckle, rng.uniform(0, 0.12))


@lru_cache
def _font(size: int) -> "FreeTypeFont":
    return needed("PIL.ImageFont").load_default(size)


def _part(image: "Image") -> dict[str, Any]:
    """As text, so that an item can be written to a file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
