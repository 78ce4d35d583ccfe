"""Small Python functions: a missing piece to fill in, or a whole function from its description. Nothing is executed."""

import random
import re
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

from dgemma.evals.tasks import Answer, Item, Score
from dgemma.evals.tasks.prose import with_article

FILL = "<fill>"

# fmt: off
NUMBERS = (
    ("ages", "age"), ("marks", "mark"), ("heights", "height"), ("levels", "level"), ("lengths", "length"),
    ("numbers", "number"), ("points", "point"), ("prices", "price"), ("scores", "score"), ("sizes", "size"),
    ("speeds", "speed"), ("steps", "step"), ("values", "value"), ("weights", "weight"), ("widths", "width"),
)
TEXTS = (
    ("cities", "city"), ("colours", "colour"), ("keys", "key"), ("labels", "label"), ("lines", "line"),
    ("names", "name"), ("notes", "note"), ("parts", "part"), ("tags", "tag"), ("titles", "title"), ("words", "word"),
)
# fmt: on
OPERATORS = (("plus", "+"), ("minus", "-"), ("times", "*"))
COMPARISONS = (
    ("above", ">"),
    ("below", "<"),
    ("equal to", "=="),
    ("of at least", ">="),
    ("of at most", "<="),
    ("other than", "!="),
)
WHOLES = (  # of a list of numbers
    ("the largest of the {many}", "max({many})"),
    ("the smallest of the {many}", "min({many})"),
    ("how many {many} there are", "len({many})"),
    ("the sum of the {many}", "sum({many})"),
    ("the average of the {many}", "sum({many}) / len({many})"),
    ("the {many} in rising order", "sorted({many})"),
    ("the {many} in falling order", "sorted({many}, reverse=True)"),
    ("the first of the {many}", "{many}[0]"),
    ("the last of the {many}", "{many}[-1]"),
    ("the {many} without the first {k}", "{many}[{k}:]"),
    ("the first {k} of the {many}", "{many}[:{k}]"),
    ("the {many} in reverse", "{many}[::-1]"),
)
STRINGS = (  # of one string
    ("the {one} in upper case", "{one}.upper()"),
    ("the {one} in lower case", "{one}.lower()"),
    ("the {one} without blanks at its ends", "{one}.strip()"),
    ("the length of the {one}", "len({one})"),
    ("the {one} backwards", "{one}[::-1]"),
    ("the {one} {k} times", "{one} * {k}"),
    ("the first {k} letters of the {one}", "{one}[:{k}]"),
    ('the {one} with "{c}" in place of "{d}"', '{one}.replace("{d}", "{c}")'),
    ('how often "{c}" is in the {one}', '{one}.count("{c}")'),
    ('whether the {one} begins with "{c}"', '{one}.startswith("{c}")'),
    ('whether the {one} ends with "{c}"', '{one}.endswith("{c}")'),
    ('whether "{c}" is in the {one}', '"{c}" in {one}'),
    ('the parts of the {one} between "{c}"', '{one}.split("{c}")'),
)
VERDICTS = (("big", "small"), ("high", "low"), ("yes", "no"), ("old", "young"), ("open", "closed"), ("good", "bad"))
LETTERS = "abcdefghijklmnopqrstuvwxyz"

COMPLETE = (
    "Fill in the missing code:\n{code}",
    "Complete this function:\n{code}",
    "What belongs at <fill>?\n{code}",
    "Replace <fill>:\n{code}",
    "Please finish this code:\n{code}",
)
WRITE = (
    "Write a Python function {signature} that {does}.",
    "Write {signature} in Python. It {does}.",
    "Please write a function {signature} that {does}.",
    "I need a Python function {signature} that {does}.",
    "Define {signature}, a function that {does}.",
)

_BLOCK = re.compile(r"```python\n(.*)\n```", re.DOTALL)


@dataclass(frozen=True)
class Function:
    """signature: name and arguments; does: completes "a function that"; body: its lines, indented from column 0."""

    signature: str
    does: str
    body: tuple[str, ...]

    @property
    def code(self) -> str:
        return "\n".join((f"def {self.signature}:", *(f"    {line}" for line in self.body)))


def draw(rng: random.Random, level: str) -> Item:
    function = rng.choice(_KINDS)(rng)
    question, answer, facts = _LEVELS[level](rng, function)
    messages = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    return Item(messages, level, facts=facts, key=function.code)


def check(item: Item, answer: Answer) -> Score:
    """exact: the code and nothing else; valid: it compiles, put in its place or taken out of its block."""
    text = answer.text.strip()
    if item.level == "write":
        block = _BLOCK.fullmatch(text)
        return Score(text == item.answer["content"], block is not None and _compiles(block[1]))
    return Score(text == item.answer["content"], bool(text) and _compiles(fill(item.facts["code"], text)))


def fill(code: str, missing: str) -> str:
    """The code with the line of `<fill>` replaced; the missing lines take that line's indentation."""
    lines = code.split("\n")
    at = next(i for i, line in enumerate(lines) if line.strip() == FILL)
    lines[at] = textwrap.indent(missing, lines[at].removesuffix(FILL))
    return "\n".join(lines)


def _complete(rng: random.Random, function: Function) -> tuple[str, str, dict[str, str]]:
    shown, missing = _hole(rng, function.body)
    code = replace(function, body=(f"# {function.does}", *shown)).code
    return rng.choice(COMPLETE).format(code=code), missing, {"code": code}


def _write(rng: random.Random, function: Function) -> tuple[str, str, dict[str, str]]:
    question = rng.choice(WRITE).format(signature=function.signature, does=function.does)
    return question, f"```python\n{function.code}\n```", {}


def _compiles(code: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(code, "<answer>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError):  # all of these on odd input
        return False
    return True


def _hole(rng: random.Random, body: tuple[str, ...]) -> tuple[tuple[str, ...], str]:
    """The body with one or two lines missing, and these, their common indentation left with the mark."""
    at = rng.randrange(len(body))
    margin = " " * (len(body[at]) - len(body[at].lstrip()))
    end = at + 1
    if end < len(body) and body[end].startswith(margin) and rng.random() < 0.4:
        end += 1
    missing = "\n".join(line.removeprefix(margin) for line in body[at:end])
    return (*body[:at], margin + FILL, *body[end:]), missing


def _name(rng: random.Random, verb: str, noun: str) -> str:
    return rng.choice((f"{verb}_{noun}", f"{verb}_the_{noun}", f"{verb}_my_{noun}", f"do_{verb}"))


def _comparison(rng: random.Random) -> tuple[str, str]:
    """A comparison with a constant, in words and in code."""
    words, sign = rng.choice(COMPARISONS)
    k = rng.randrange(100)
    return f"{words} {k}", f"{sign} {k}"


def _formula(rng: random.Random) -> Function:
    x, y = (one for _, one in rng.sample(NUMBERS, 2))
    (first, p), (second, q) = rng.choice((OPERATORS[0], OPERATORS[2])), rng.choice(OPERATORS[:2])
    k = rng.randrange(1, 100)
    does, value = f"returns {x} {first} {y}", f"{x} {p} {y}"
    if rng.random() < 0.6:
        does, value = f"{does} {second} {k}", f"{value} {q} {k}"
    return Function(f"{_name(rng, 'combine', x)}({x}, {y})", does, (f"return {value}",))


def _whole(rng: random.Random) -> Function:
    many, _ = rng.choice(NUMBERS)
    words, value = (part.format(many=many, k=rng.randrange(2, 10)) for part in rng.choice(WHOLES))
    return Function(f"{_name(rng, 'find', many)}({many})", f"returns {words}", (f"return {value}",))


def _string(rng: random.Random) -> Function:
    _, one = rng.choice(TEXTS)
    c, d = rng.sample(LETTERS, 2)
    k = rng.randrange(2, 10)
    words, value = (part.format(one=one, k=k, c=c, d=d) for part in rng.choice(STRINGS))
    return Function(f"{_name(rng, 'change', one)}({one})", f"returns {words}", (f"return {value}",))


def _each(rng: random.Random) -> Function:
    many, one = rng.choice(NUMBERS)
    (words, sign), k = rng.choice(OPERATORS), rng.randrange(1, 100)
    body = (f"return [{one} {sign} {k} for {one} in {many}]",)
    return Function(f"{_name(rng, 'change', many)}({many})", f"returns each {one} {words} {k}", body)


def _keep(rng: random.Random) -> Function:
    many, one = rng.choice(NUMBERS)
    words, test = _comparison(rng)
    body = (f"return [{one} for {one} in {many} if {one} {test}]",)
    return Function(f"{_name(rng, 'keep', many)}({many})", f"returns the {many} {words}", body)


def _count(rng: random.Random) -> Function:
    many, one = rng.choice(NUMBERS)
    words, test = _comparison(rng)
    body = ("total = 0", f"for {one} in {many}:", f"    if {one} {test}:", "        total += 1", "return total")
    return Function(f"{_name(rng, 'count', many)}({many})", f"counts the {many} {words}", body)


def _add_up(rng: random.Random) -> Function:
    many, one = rng.choice(NUMBERS)
    (words, sign), k = rng.choice(OPERATORS), rng.randrange(1, 100)
    body = ("total = 0", f"for {one} in {many}:", f"    total += {one} {sign} {k}", "return total")
    return Function(f"{_name(rng, 'add', many)}({many})", f"adds up each {one} {words} {k}", body)


def _first(rng: random.Random) -> Function:
    many, one = rng.choice(NUMBERS)
    words, test = _comparison(rng)
    body = (f"for {one} in {many}:", f"    if {one} {test}:", f"        return {one}", "return None")
    return Function(f"{_name(rng, 'find', many)}({many})", f"returns the first {one} {words}, or None", body)


def _judge(rng: random.Random) -> Function:
    _, one = rng.choice(NUMBERS)
    words, test = _comparison(rng)
    right, wrong = rng.choice(VERDICTS)
    body = (f"if {one} {test}:", f'    return "{right}"', f'return "{wrong}"')
    does = f'returns "{right}" for {with_article(one)} {words}, else "{wrong}"'
    return Function(f"{_name(rng, 'judge', one)}({one})", does, body)


def _limit(rng: random.Random) -> Function:
    _, one = rng.choice(NUMBERS)
    low = rng.randrange(50)
    high = low + rng.randrange(1, 50)
    body = (f"if {one} < {low}:", f"    return {low}", f"if {one} > {high}:", f"    return {high}", f"return {one}")
    return Function(f"{_name(rng, 'limit', one)}({one})", f"keeps the {one} between {low} and {high}", body)


def _divides(rng: random.Random) -> Function:
    _, one = rng.choice(NUMBERS)
    k = rng.randrange(2, 100)
    does = f"tells whether the {one} can be divided by {k}"
    return Function(f"{_name(rng, 'check', one)}({one})", does, (f"return {one} % {k} == 0",))


def _repeat(rng: random.Random) -> Function:
    _, one = rng.choice(TEXTS)
    k = rng.randrange(2, 100)
    body = (f"for i in range({k}):", f"    print({one})")
    return Function(f"{_name(rng, 'show', one)}({one})", f"prints the {one} {k} times", body)


def _table(rng: random.Random) -> Function:
    """A dict from each entry to something of it."""
    if rng.random() < 0.5:
        many, one = rng.choice(NUMBERS)
        (words, sign), k = rng.choice(OPERATORS), rng.randrange(1, 100)
        words, value = f"{one} {words} {k}", f"{one} {sign} {k}"
    else:
        many, one = rng.choice(TEXTS)
        c = rng.choice(LETTERS)
        words, value = f'the count of "{c}" in it', f'{one}.count("{c}")'
    body = ("table = {}", f"for {one} in {many}:", f"    table[{one}] = {value}", "return table")
    return Function(f"{_name(rng, 'map', many)}({many})", f"maps each {one} to {words}", body)


def _join(rng: random.Random) -> Function:
    many, one = rng.choice(TEXTS)
    c = rng.choice(LETTERS)
    sep = rng.choice((", ", " ", "-", "; ", "/", "+"))
    body = ("found = []", f"for {one} in {many}:", f'    if "{c}" in {one}:', f"        found.append({one})")
    does = f'joins the {many} that have "{c}" with "{sep}"'
    return Function(f"{_name(rng, 'join', many)}({many})", does, (*body, f'return "{sep}".join(found)'))


_KINDS: tuple[Callable[[random.Random], Function], ...] = (
    _formula,
    _whole,
    _string,
    _each,
    _keep,
    _count,
    _add_up,
    _first,
    _judge,
    _limit,
    _divides,
    _repeat,
    _table,
    _join,
)
_LEVELS = {"complete": _complete, "write": _write}
LEVELS = tuple(_LEVELS)
