"""Grammars against lark's own Earley parser."""

import itertools
import random
import sys
from collections import deque
from functools import cache
from time import perf_counter

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.lark import from_lark

from dgemma.constraints.automaton import Automaton, build
from dgemma.constraints.grammar import grammar

lark = pytest.importorskip("lark")

ARITHMETIC = """
    ?start: sum
    ?sum: product | sum "+" product | sum "-" product
    ?product: atom | product "*" atom
    ?atom: NUMBER | "-" atom | "(" sum ")"
    NUMBER: "0".."9"
    %ignore " "
"""
JSON = r"""
    ?start: object | array
    value: object | array | ESCAPED_STRING | SIGNED_NUMBER | "true" | "false" | "null"
    object: "{" [pair ("," pair)*] "}"
    pair: ESCAPED_STRING ":" value
    array: "[" [value ("," value)*] "]"
    %import common (ESCAPED_STRING, SIGNED_NUMBER, WS)
    %ignore WS
"""
SELECT = """
    start: "select"i columns "from"i NAME ["where"i condition]
    columns: "*" | NAME ("," NAME)*
    condition: condition ("and"i | "or"i) condition | NAME OPERATOR (NAME | INT) | "(" condition ")"
    OPERATOR: "=" | "<" ["=" | ">"] | ">" "="?
    NAME: /[a-z_][a-z_0-9]*/i
    %import common.INT
    %ignore /[ \\n]+/
"""
CSV = r"""
    start: line (NL line)*
    line: cell | line "," cell
    cell: QUOTED | PLAIN |
    QUOTED: "\"" (/[^"]/ | "\"\"")* "\""
    PLAIN: /[^",\r\n]+/
    NL: "\r"? "\n"
"""
LISP = """
    start: term
    term: ATOM | "(" term* ")" | "'" term
    ATOM: ("a".."z")+
    %ignore " " | /;[^\\n]*\\n/
"""
DATE = """
    start: year "-" MONTH "-" DAY
    year: DIGIT~4
    MONTH: "0" "1".."9" | "1" "0".."2"
    DAY: "0" /[1-9]/ | "1".."2" DIGIT | "3" ("0" | "1")
    %import common.DIGIT
"""
COMMENTS = """
    start: (WORD | C_COMMENT)+
    %import common (C_COMMENT, WORD)
"""
LARGE = {
    "arithmetic": ARITHMETIC,
    "json": JSON,
    "select": SELECT,
    "csv": CSV,
    "lisp": LISP,
    "date": DATE,
    "comments": COMMENTS,
}
SMALL = {  # letters a, b and c; every text up to some length is tried
    "left recursion": 'start: start "b" "a" | "a"',
    "right recursion": 'start: "a" "b" start | "c"',
    "recursion at both ends": 'start: start "b" start | "a"',
    "prefixes and suffixes": 'start: "a" start | start "b" | "c"',
    "recursion by way of another": 'start: "a" x | "b"\nx: "c" start | "a"',
    "left recursion by way of another": 'start: x "a" | "b"\nx: start "c" | "a"',
    "recursion behind what may be empty": 'start: "a"? start "b" | "c"',
    "optional recursion": 'start: (start "a")? "b" | start?  "c" "c"',
    "itself": 'start: start | "a" | "b" start',
    "nesting": 'start: "a" start "b" | "c" |',
    "two kinds of nesting": 'start: "a" x "b" | "c"\nx: "b" start "a" | start | "b" x "c"',
    "nesting in a row": 'start: x*\nx: "a" start "b" | "c"',
    "counts": 'start: "a"~2 ("b" "c"?)~0..2 "a"~0..1',
    "operators": 'start: ("a" | "b" "c")+ ["b" ["c"]] -> x | "c"? ("b")*',
    "any case": 'start: "aB"i /[b-c]/i',
    "excluded letters in any case": "start: /[^Ab]/i /[^\\x00-a]/",
    "ranges": 'start: ("a".."b")+ A\nA: "b".."c"~2',
    "ignored": 'start: "a"+ "c"\n%ignore "b"',
    "ignored runs and nothing else": 'start: "a"*\n%ignore /b+/\n%ignore "c" "c"',
    "templates": 'start: _list{"a", B} _list{x, "a"}\n_list{item, mark}: item (mark item)*\nx: B | "c"\nB: "b"',
    "templates in templates": 'start: _two{_two{A}}\n_two{x}: x x | _two{"b"}~2\nA: "a"',
    "terminals in terminals": 'start: A B\nA: B | "a" B?\nB: "b" | C~1..2\nC: "c"',
    "extended": 'start: "a" x\nx: "b"\n%extend x: "c" x',
}


@cache
def parser(source: str) -> "lark.Lark":
    return lark.Lark(source, parser="earley", lexer="dynamic_complete", ambiguity="resolve")


@cache
def automaton(source: str, depth: int = 3) -> Automaton:
    return build(grammar(source, depth))


def parses(source: str, text: str) -> bool:
    try:
        parser(source).parse(text)
    except lark.exceptions.LarkError:
        return False
    return True


def remaining(found: Automaton) -> np.ndarray:
    """Of each state, the fewest bytes to an accepting one."""
    before: dict[int, set[int]] = {}
    for state, row in enumerate(found.transitions):
        for target in set(row[row >= 0].tolist()):
            before.setdefault(target, set()).add(state)
    distance = np.where(found.accepting, 0, -1)
    queue = deque(np.flatnonzero(found.accepting).tolist())
    while queue:
        state = queue.popleft()
        for source in before.get(state, ()):
            if distance[source] < 0:
                distance[source] = distance[state] + 1
                queue.append(source)
    return distance


def drawn(found: Automaton, distance: np.ndarray, rng: random.Random, length: int) -> str:
    """A text along random edges, and the shortest way to an end after some bytes."""
    state, data = 0, bytearray()
    while not (found.accepting[state] and (len(data) >= length or rng.random() < 0.1)):
        row = found.transitions[state]
        edges = [byte for byte in range(256) if row[byte] >= 0]
        if not edges:
            break
        if len(data) >= length:
            edges = [byte for byte in edges if distance[row[byte]] < distance[state]]
        target = rng.choice(sorted({int(row[byte]) for byte in edges}))  # by state: letters do not outnumber marks
        data.append(rng.choice([byte for byte in edges if row[byte] == target]))
        state = target
    return data.decode()


def nesting(text: str) -> int:
    deepest = level = 0
    for character in text:
        level += (character in "([{'") - (character in ")]}")
        deepest = max(deepest, level)
    return deepest


@pytest.mark.parametrize("name", SMALL)
def test_small_languages_are_those_of_lark(name: str) -> None:
    source, length = SMALL[name], 5
    texts = ["".join(t) for n in range(length + 1) for t in itertools.product("abc", repeat=n)]
    ours = {text for text in texts if automaton(source, 8).accepts(text.encode())}
    assert ours == {text for text in texts if parses(source, text)}
    assert ours


@pytest.mark.parametrize("name", LARGE)
def test_lark_parses_what_the_automaton_accepts(name: str) -> None:
    found, rng = automaton(LARGE[name]), random.Random(name)
    distance = remaining(found)
    for _ in range(25):
        text = drawn(found, distance, rng, rng.randrange(25))
        assert parses(LARGE[name], text), text


@pytest.mark.parametrize("name", LARGE)
def test_the_automaton_accepts_what_lark_makes(name: str) -> None:
    source = LARGE[name]

    @settings(max_examples=10, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(from_lark(parser(source), alphabet=st.characters(codec="ascii")))
    def check(text: str) -> None:
        assume(nesting(text) < 3 and len(text) < 40 and parses(source, text))
        assert automaton(source).accepts(text.encode())

    check()


def test_any_length_without_nesting() -> None:
    found = automaton(ARITHMETIC, 1)
    assert found.accepts(b"-1" + b"*2 + 3" * 500)
    assert not found.accepts(b"(1)")


@pytest.mark.parametrize("depth", [2, 5])
def test_the_depth_counts_uses_within_one_another(depth: int) -> None:
    found = automaton('start: "[" start? "]"', depth)
    assert found.accepts(b"[" * depth + b"]" * depth)
    assert not found.accepts(b"[" * (depth + 1) + b"]" * (depth + 1))


def test_recursions_that_do_not_share_rules_have_the_depth_each() -> None:
    found = automaton('start: "[" start "]" | x\nx: "(" x ")" | "a"', 3)
    assert found.accepts(b"[[((a))]]")
    assert not found.accepts(b"(((a)))")


def test_deep_nesting_of_one_kind_stays_small() -> None:
    assert len(automaton(ARITHMETIC, 25).accepting) < 100


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ('start: "a"\nb: (', "line 2 column 5"),
        ("start: b", "'b' used but not defined"),
        ('x: "a"', "no rule 'start'"),
        ('start: "a"~3..2', "~3..2 is no range"),
        ('start: "a"~-1', "~-1 is no range"),
        ('start: f{a}\nf{x}: x{"b"}\na: "a"', "no template of 1 parameters"),
        ('start: "ab".."c"', '"ab" .. "c"'),
        ("start: /(/", r"missing \)"),
        ("start: A\n%declare A", "'A' is declared, but not defined"),
        ('start: A\nA: "x" B\nB: A', "Recursion in terminal"),
        ('start: A\nA: "x" /a(?=b)/', "terminal 'A': .* lookaround"),
        ('start: A\nA: /".*?"/', "terminal 'A': .* lazy"),
        ("start: /a.b/s", "flag 's'"),
        ("start: /^a/", "anchors"),
        (r"start: /a\Z/", "anchors"),
        ('start: "a" start', "'start' never ends"),
        ('start: "a" | x\nx: "(" x ")"', "'x' cannot end within 3"),
        ("start: X\n%import nowhere.X", "imports nowhere.lark"),
        ('start: _t{"a"}\n_t{x}: x | _t{_p{x, x}}\n_p{x, y}: x y', "templates"),
    ],
)
def test_what_is_wrong_with_a_grammar(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        grammar(source, 3)
    assert "\n" not in str(error.value)


def test_marks_that_only_look_like_refused_ones() -> None:
    found = automaton(r"start: /[*?^$]\+?\$\\?/")
    assert all(found.accepts(text) for text in (b"*+$", b"$$\\", b"?$"))


@pytest.mark.parametrize(
    "source",
    [
        "start: T0\n" + "".join(f"T{i}: T{i + 1} T{i + 1}\n" for i in range(40)) + 'T40: "a"',
        "start: r0\n"
        + "".join(
            f'r{i}: r{(7 * i + 3) % 40} "v" | r{(11 * i + 5) % 40} "a" | r{(i + 1) % 40} "b" | "c{i}"\n'
            for i in range(40)
        ),
        "start: " + "(" * 3000 + '"a"' + ")" * 3000,
    ],
)
def test_what_is_too_large_is_refused_soon(source: str) -> None:
    started = perf_counter()
    with pytest.raises(ValueError, match=r"more than|too deeply"):
        grammar(source)
    assert perf_counter() - started < 5


def test_many_optional_parts_stay_few_nodes() -> None:
    found = automaton("start: " + " ".join(f'"{c}"?' for c in "abcdefghijklmnopqrstuvwxyz"))
    assert found.accepts(b"aez")
    assert not found.accepts(b"za")


def test_a_depth_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, not 0"):
        grammar('start: "a"', 0)


def test_files_beside_the_program_are_not_imported(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.lark").write_text('X: "secret"')
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(tmp_path / "main.py"), raising=False)
    monkeypatch.chdir(tmp_path)
    for place in (".mine", "mine"):
        with pytest.raises(ValueError, match="import"):
            grammar(f"start: X\n%import {place}.X")


def test_cases_beyond_ascii() -> None:
    found = automaton('start: "éß"i /[^Д]/i')
    assert all(found.accepts(text.encode()) for text in ("éßa", "ÉßЖ"))
    assert not any(found.accepts(text.encode()) for text in ("éßД", "éßд", "eßa"))


def test_without_lark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lark.load_grammar", None)
    with pytest.raises(OSError, match="pip install 'dgemma"):
        grammar('start: "a"')
