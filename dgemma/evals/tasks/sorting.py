"""Lists of numbers, words and names: put in order, turned round, searched and counted."""

import random
from collections.abc import Callable

from dgemma.evals.tasks import Answer, Item, Score
from dgemma.evals.tasks.prose import ANIMALS, COLOURS, PEOPLE, THINGS

# fmt: off
WORDS = (
    *ANIMALS, *COLOURS, *THINGS,
    "apple", "bread", "butter", "cheese", "egg", "honey", "lemon", "milk", "nut", "onion", "pear", "rice", "salt",
    "cloud", "rain", "river", "road", "sand", "snow", "star", "stone", "sun", "tree", "water", "wind",
)
# fmt: on
POOLS = (("words", WORDS), ("words", WORDS), ("names", PEOPLE))

RISING = (
    "Sort these numbers: {list}",
    "Put these numbers in order: {list}",
    "Please sort: {list}",
    "Sort from small to large: {list}",
    "Order these numbers: {list}",
)
FALLING = (
    "Sort from large to small: {list}",
    "Sort these numbers in descending order: {list}",
    "Put these numbers in order, the largest first: {list}",
    "Please sort, largest first: {list}",
)
ALPHABET = (
    "Sort these {kind}: {list}",
    "Put these {kind} in alphabetical order: {list}",
    "Sort from A to Z: {list}",
    "Please sort the {kind}: {list}",
    "Order these {kind}: {list}",
)
REVERSE = (
    "Reverse this list: {list}",
    "Turn this list round: {list}",
    "Write these {kind} in reverse order: {list}",
    "Please reverse: {list}",
)
PICK: tuple[tuple[str, Callable[[list[int]], int]], ...] = (
    ("What is the largest of {list}?", max),
    ("Which number is the largest: {list}?", max),
    ("Find the largest number: {list}", max),
    ("What is the smallest of {list}?", min),
    ("Which number is the smallest: {list}?", min),
    ("Find the smallest number: {list}", min),
    ("What is the first number of {list}?", lambda numbers: numbers[0]),
    ("What is the last number of {list}?", lambda numbers: numbers[-1]),
)
COUNT = (
    "How many {kind} are in this list: {list}",
    "Count these {kind}: {list}",
    "How long is this list: {list}",
    "How many {kind} do you see: {list}",
)
COUNT_ABOVE = "How many of these numbers are above {limit}: {list}"


def draw(rng: random.Random, level: str) -> Item:
    question, answer, given = _LEVELS[level](rng)
    message = {"role": "assistant", "content": answer}
    if level == "thinking":
        message["reasoning"] = _selection(given)
    messages = ({"role": "user", "content": question}, message)
    return Item(messages, level, think=level == "thinking", facts={"given": given})


def check(item: Item, answer: Answer) -> Score:
    """exact: the answer and nothing else; valid: all entries that were given, one of them, or a count."""
    text, given = answer.text.strip(), item.facts["given"]
    if item.level == "count":
        valid = text.isdecimal()
    elif item.level == "pick":
        valid = text in given
    else:
        valid = sorted(text.split(", ")) == sorted(given)
    return Score(text == item.answer["content"], valid)


Listed = tuple[str, str, list[str]]
"""A question, its answer, and the entries of the list."""


def _numbers(rng: random.Random, most: int = 8) -> list[int]:
    return rng.sample(range(rng.choice((100, 100, 1000))), rng.randint(3, most))


def _words(rng: random.Random) -> tuple[str, list[str]]:
    kind, pool = rng.choice(POOLS)
    return kind, rng.sample(pool, rng.randint(3, 8))


def _entries(rng: random.Random) -> tuple[str, list[str]]:
    """Of any kind, with the word for it."""
    return ("numbers", [str(n) for n in _numbers(rng)]) if rng.random() < 0.5 else _words(rng)


def _ordered(rng: random.Random, phrasings: tuple[str, ...], reverse: bool = False, most: int = 8) -> Listed:
    numbers = _numbers(rng, most)
    given = [str(n) for n in numbers]
    answer = ", ".join(str(n) for n in sorted(numbers, reverse=reverse))
    return rng.choice(phrasings).format(list=", ".join(given)), answer, given


def _rising(rng: random.Random) -> Listed:
    return _ordered(rng, RISING)


def _falling(rng: random.Random) -> Listed:
    return _ordered(rng, FALLING, reverse=True)


def _thinking(rng: random.Random) -> Listed:
    return _ordered(rng, RISING, most=6)


def _alphabet(rng: random.Random) -> Listed:
    kind, given = _words(rng)
    return rng.choice(ALPHABET).format(kind=kind, list=", ".join(given)), ", ".join(sorted(given)), given


def _reverse(rng: random.Random) -> Listed:
    kind, given = _entries(rng)
    return rng.choice(REVERSE).format(kind=kind, list=", ".join(given)), ", ".join(given[::-1]), given


def _pick(rng: random.Random) -> Listed:
    numbers = _numbers(rng)
    given = [str(n) for n in numbers]
    question, choose = rng.choice(PICK)
    return question.format(list=", ".join(given)), str(choose(numbers)), given


def _count(rng: random.Random) -> Listed:
    if rng.random() < 0.3:
        numbers = _numbers(rng)
        limit = rng.choice(numbers) // 10 * 10
        given = [str(n) for n in numbers]
        answer = sum(n > limit for n in numbers)
        return COUNT_ABOVE.format(limit=limit, list=", ".join(given)), str(answer), given
    kind, given = _entries(rng)
    return rng.choice(COUNT).format(kind=kind, list=", ".join(given)), str(len(given)), given


def _selection(given: list[str]) -> str:
    """Line by line what is left, and the smallest of it."""
    left, lines = list(given), []
    while len(left) > 1:
        smallest = min(left, key=int)
        lines.append(f"{', '.join(left)}: {smallest}")
        left.remove(smallest)
    return "\n".join(lines)


_LEVELS: dict[str, Callable[[random.Random], Listed]] = {
    "numbers": _rising,
    "words": _alphabet,
    "descending": _falling,
    "reverse": _reverse,
    "pick": _pick,
    "count": _count,
    "thinking": _thinking,
}
LEVELS = tuple(_LEVELS)
