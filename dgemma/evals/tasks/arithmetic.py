"""Whole numbers: sums, differences, products and chains of them, bare or in a small story; no result is below zero."""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from dgemma.evals.tasks import Answer, Item, Score
from dgemma.evals.tasks.prose import PEOPLE

THINGS = ("apples", "books", "cards", "coins", "cups", "eggs", "hats", "nuts", "pens", "shells", "stamps", "stones")

BARE = (
    "What is {sum}?",
    "How much is {sum}?",
    "Calculate {sum}.",
    "Work out {sum}.",
    "{sum} = ?",
    "Please tell me the result of {sum}.",
)
ADD = (
    "What is {a} plus {b}?",
    "Add {a} and {b}.",
    "What is the sum of {a} and {b}?",
)
ADD_STORIES = (
    "{who} has {a} {things} and buys {b} more. How many {things} does {who} have?",
    "{who} finds {a} {things} today and {b} tomorrow. How many {things} is that?",
    "There are {a} {things} in a box and {b} in a bag. How many {things} are there?",
    "{who} has {a} {things}. {other} has {b}. How many {things} do they have?",
)
SUBTRACT = (
    "What is {a} minus {b}?",
    "Subtract {b} from {a}.",
    "What is the difference between {a} and {b}?",
)
SUBTRACT_STORIES = (
    "{who} has {a} {things} and gives {b} to {other}. How many {things} are left?",
    "{who} had {a} {things} and lost {b}. How many {things} does {who} have?",
    "There are {a} {things} in a box. {who} takes {b}. How many {things} are left?",
    "{who} has {a} {things}. {other} has {b}. How many more {things} does {who} have?",
)
MULTIPLY = (
    "What is {a} times {b}?",
    "Multiply {a} by {b}.",
    "What is the product of {a} and {b}?",
)
MULTIPLY_STORIES = (
    "{who} has {b} boxes with {a} {things} each. How many {things} does {who} have?",
    "There are {b} bags. Each bag has {a} {things}. How many {things} are there?",
    "{who} buys {a} {things} every day for {b} days. How many {things} is that?",
    "{who} gives {a} {things} to each of {b} friends. How many {things} is that?",
)
STEPS_STORIES = (
    ("++", "{who} has {a} {things}, buys {b} more and finds {c}. How many {things} does {who} have?"),
    ("+-", "{who} has {a} {things}, buys {b} more and gives {c} to {other}. How many {things} are left?"),
    ("-+", "{who} has {a} {things}, loses {b} and buys {c} more. How many {things} does {who} have?"),
    ("--", "There are {a} {things} in a box. {who} takes {b} and {other} takes {c}. How many {things} are left?"),
)

_INTEGER = re.compile(r"-?\d+", re.ASCII)


@dataclass(frozen=True)
class Problem:
    """lines: the partial results that lead to the number; key: what is computed, see `Item`."""

    question: str
    number: int
    lines: tuple[str, ...]
    key: str


def draw(rng: random.Random, level: str) -> Item:
    problem = _LEVELS[level](rng)
    answer = {"role": "assistant", "content": str(problem.number)}
    if level == "thinking":
        answer["reasoning"] = "\n".join(problem.lines)
    messages = ({"role": "user", "content": problem.question}, answer)
    return Item(messages, level, think=level == "thinking", key=problem.key)


def check(item: Item, answer: Answer) -> Score:
    """exact: the number and nothing else; valid: a whole number."""
    text = answer.text.strip()
    return Score(text == item.answer["content"], _INTEGER.fullmatch(text) is not None)


def _number(rng: random.Random, digits: int, least: int = 0) -> int:
    """Each count of digits up to `digits` equally often."""
    count = rng.randint(1, digits)
    return rng.randrange(max(least, 10 ** (count - 1) if count > 1 else 0), 10**count)


def _tell(rng: random.Random, story: str, *numbers: int) -> str:
    who, other = rng.sample(PEOPLE, 2)
    return story.format(who=who, other=other, things=rng.choice(THINGS), **dict(zip("abc", numbers, strict=False)))


def _pair(
    rng: random.Random, sign: str, a: int, b: int, phrasings: tuple[str, ...], stories: tuple[str, ...]
) -> Problem:
    if min(a, b) > 1 and rng.random() < 0.5:  # "1 apples" is no English
        question = _tell(rng, rng.choice(stories), a, b)
    else:
        question = rng.choice(BARE + phrasings).format(a=a, b=b, sum=f"{a} {sign} {b}")
    # What has one digit each must be learnt by heart; of the rest, some is never seen in any phrasing.
    ordered = (a, b) if sign == "-" else (min(a, b), max(a, b))
    key = "" if max(a, b) < 10 else f" {sign} ".join(map(str, ordered))
    return Problem(question, *_work(a, sign, (b,)), key)


def _work(first: int, signs: str, others: tuple[int, ...]) -> tuple[int, tuple[str, ...]]:
    """The result from left to right, and a line for each step."""
    number = first
    lines: list[str] = []
    for sign, other in zip(signs, others, strict=True):
        result = {"+": number + other, "-": number - other, "*": number * other}[sign]
        lines.append(f"{number} {sign} {other} = {result}")
        number = result
    return number, tuple(lines)


def _add(rng: random.Random) -> Problem:
    return _pair(rng, "+", _number(rng, 3), _number(rng, 3), ADD, ADD_STORIES)


def _subtract(rng: random.Random) -> Problem:
    b, a = sorted((_number(rng, 3), _number(rng, 3)))
    return _pair(rng, "-", a, b, SUBTRACT, SUBTRACT_STORIES)


def _multiply(rng: random.Random) -> Problem:
    return _pair(rng, "*", rng.randrange(1, 100), rng.randrange(2, 10), MULTIPLY, MULTIPLY_STORIES)


def _steps(rng: random.Random) -> Problem:
    signs, story = rng.choice(STEPS_STORIES)
    told = rng.random() < 0.5
    if not told:
        signs = "".join(rng.choice("+-") for _ in range(rng.randint(2, 3)))
    first = number = rng.randrange(10, 100)
    others: list[int] = []
    for sign in signs:
        other = _number(rng, 2, least=2) if sign == "+" else rng.randint(0, number)
        others.append(other)
        number += other if sign == "+" else -other
    chain = " ".join([str(first), *(f"{sign} {other}" for sign, other in zip(signs, others, strict=True))])
    told = told and min(others) > 1
    question = _tell(rng, story, first, *others) if told else rng.choice(BARE).format(sum=chain)
    return Problem(question, *_work(first, signs, tuple(others)), chain)


def _long_product(rng: random.Random) -> Problem:
    """Tens and ones apart, as one does it in one's head."""
    a, b = rng.randrange(11, 100), rng.randrange(2, 10)
    product = _pair(rng, "*", a, b, MULTIPLY, MULTIPLY_STORIES)
    tens, ones = a - a % 10, a % 10
    if not ones:
        return product
    partial = (f"{tens} * {b} = {tens * b}", f"{ones} * {b} = {ones * b}")
    return replace(product, lines=(*partial, f"{tens * b} + {ones * b} = {product.number}"))


def _thinking(rng: random.Random) -> Problem:
    return _steps(rng) if rng.random() < 0.7 else _long_product(rng)


_LEVELS: dict[str, Callable[[random.Random], Problem]] = {
    "add": _add,
    "subtract": _subtract,
    "multiply": _multiply,
    "steps": _steps,
    "thinking": _thinking,
}
LEVELS = tuple(_LEVELS)
