"""Markdown tables: made from a list, completed by a rule, read."""

import random
import re
from collections.abc import Sequence

from dgemma.evals.tasks import Answer, Item, Score, words

LEVELS: tuple[str, ...] = ("make", "fill", "column", "lookup")

# Heads of columns, the words of a row, and what stands in them.
KINDS = (
    ("{name} {count} {item}", {"name": words.PERSON, "count": words.whole(2, 99), "item": words.THING}),
    ("{name} is {age}", {"name": words.PERSON, "age": words.whole(4, 99)}),
    ("{name} from {city}, {age}", {"name": words.PERSON, "city": words.CITY, "age": words.whole(4, 99)}),
    ("{item} at {price}", {"item": words.THING, "price": words.tenths(1, 60)}),
    ("{city} {degrees} {sky}", {"city": words.CITY, "degrees": words.whole(-15, 38), "sky": words.word(words.SKIES)}),
    ("{from} to {to}", {"from": words.CITY, "to": words.CITY}),
)
MAKE = (
    "Make a table of {heads}: {rows}",
    "{rows}. Make that a table with {heads}.",
    "Put this into a table with {heads}: {rows}",
    "Table with the columns {heads}, please: {rows}",
    "Show as a table ({heads}): {rows}",
)
FILL = (
    "Fill in {rule}.\n{table}",
    "Complete the table: {rule}\n{table}",
    "{table}\nFill it: {rule}",
    "{table}\nWhat is missing? {rule}",
)
COLUMN = (
    "List the column {head}.\n{table}",
    "What stands under {head}?\n{table}",
    "{table}\nGive me all of {head}, with commas.",
    "{table}\nOnly the column {head}, please.",
)
COUNTS = (
    "How many {item} does {name} have?",
    "{item} of {name}?",
    "Number of {item} for {name}?",
    "What has {name} in {item}?",
)
OWNERS = ("Who has {count} {item}?", "{count} {item}: whose are they?", "Which name has {count} {item}?")

Row = Sequence[str]


def draw(rng: random.Random, level: str) -> Item:
    question, answer = {"make": _make, "fill": _fill, "column": _column, "lookup": _lookup}[level](rng)
    return Item(({"role": "user", "content": question}, {"role": "assistant", "content": answer}), level)


def check(item: Item, answer: Answer) -> Score:
    text, wanted = answer.text.strip(), item.answer["content"]
    if item.level in ("make", "fill"):
        return Score(text == wanted, well_formed(text))
    kinds = {_kind(cell) for cell in wanted.split(", ")}
    several = item.level == "column" or "," not in text
    return Score(text == wanted, several and all(_kind(cell) in kinds for cell in text.split(",")))


def table(heads: Row, rows: Sequence[Row]) -> str:
    """A Markdown table without padding."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows))


def well_formed(text: str) -> bool:
    """Whether a text is one Markdown table: heads, a rule and rows, all of the same number of cells."""
    lines = text.split("\n")
    if len(lines) < 3 or not all(re.fullmatch(r"\|.*\|", line) for line in lines):
        return False
    cells = [line[1:-1].split("|") for line in lines]
    ruled = all(re.fullmatch(r" *:?-{3,}:? *", cell) for cell in cells[1])
    return ruled and len({len(row) for row in cells}) == 1


def _make(rng: random.Random) -> tuple[str, str]:
    template, heads, rows = _rows(rng)
    told = [template.format(**dict(zip(heads, row, strict=True))) for row in rows]
    # A comma within a row must not part it.
    joined = ("; " if "," in template else ", ").join(told)
    return rng.choice(MAKE).format(heads=", ".join(heads), rows=joined), table(heads, rows)


def _fill(rng: random.Random) -> tuple[str, str]:
    """The last column is empty; a rule says what belongs there."""
    a, b = rng.sample(words.THINGS, 2)
    kind = rng.choice(("sum", "rest", "more", "double"))
    numbers = [sorted(rng.sample(range(1, 60), 2), reverse=True) for _ in range(rng.randint(2, 5))]
    rows: Sequence[tuple[str | int, ...]]
    if kind == "sum":
        heads, rule, rows = (a, b, "total"), f"total = {a} + {b}", [(x, y, x + y) for x, y in numbers]
    elif kind == "rest":
        heads, rule, rows = (a, b, "rest"), f"rest = {a} - {b}", [(x, y, x - y) for x, y in numbers]
    else:
        plus = rng.randint(1, 20)
        rule = f"more = {a} + {plus}" if kind == "more" else f"double = 2 * {a}"
        people = rng.sample(words.PEOPLE, len(numbers))
        heads = ("name", a, kind)
        rows = [(who, x, x + plus if kind == "more" else 2 * x) for who, (x, _) in zip(people, numbers, strict=True)]
    full = [[str(cell) for cell in row] for row in rows]
    empty = table(heads, [[*row[:-1], ""] for row in full])
    return rng.choice(FILL).format(rule=rule, table=empty), table(heads, full)


def _column(rng: random.Random) -> tuple[str, str]:
    _, heads, rows = _rows(rng)
    at = rng.randrange(len(heads))
    return rng.choice(COLUMN).format(head=heads[at], table=table(heads, rows)), ", ".join(row[at] for row in rows)


def _lookup(rng: random.Random) -> tuple[str, str]:
    things = rng.sample(words.THINGS, rng.randint(1, 2))
    people = rng.sample(words.PEOPLE, rng.randint(2, 5))
    # No count stands twice in a column, so that it has one owner.
    counts = [[str(count) for count in rng.sample(range(1, 100), len(people))] for _ in things]
    given = table(["name", *things], list(zip(people, *counts, strict=True)))
    column, row = rng.randrange(len(things)), rng.randrange(len(people))
    name, count = people[row], counts[column][row]
    asks, answer = rng.choice(((COUNTS, count), (OWNERS, name)))
    question = rng.choice(asks).format(item=things[column], name=name, count=count)
    return (f"{given}\n{question}" if rng.random() < 0.5 else f"{question}\n{given}"), answer


def _rows(rng: random.Random) -> tuple[str, tuple[str, ...], list[list[str]]]:
    """How a row is said, the heads of its columns, and a few rows."""
    template, slots = rng.choice(KINDS)
    heads = tuple(slots)
    rows = [list(words.draw_all(slots, heads, rng)[1].values()) for _ in range(rng.randint(2, 5))]
    return template, heads, rows


def _kind(cell: str) -> str:
    """ "number", "word" or "", for what is neither."""
    text = cell.strip()
    if re.fullmatch(r"-?\d+(\.\d+)?", text):
        return "number"
    return "word" if text.isalpha() else ""
