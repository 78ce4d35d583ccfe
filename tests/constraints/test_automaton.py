"""Languages against Python's regular expressions, and the shape, size and limits of automata."""

import random
import re
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dgemma.constraints.automaton import Automaton, build
from dgemma.constraints.deterministic import Deterministic, smallest, trimmed
from dgemma.constraints.nodes import (
    ANY,
    EMPTY,
    LAST,
    NOTHING,
    Both,
    Chars,
    Node,
    Repeat,
    Special,
    choice,
    optional,
    sequence,
    text,
)
from dgemma.constraints.regex import fullmatch, search

QUICK = settings(deadline=None, max_examples=100, suppress_health_check=list(HealthCheck))
EDGES = [0, 0x7F, 0x80, 0x7FF, 0x800, 0xFFF, 0x1000, 0xCFFF, 0xD000, 0xD7FF, 0xE000, 0xFFFF, 0x10000, 0x3FFFF, 0x40000]

patterns = st.recursive(
    st.sampled_from(["a", "b", "[ab]", "é", "[^a]", "."]),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda options: f"(?:{'|'.join(options)})"),
        st.builds("(?:{}){}".format, inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}"])),
    ),
    max_leaves=8,
)


def distances(automaton: Automaton) -> np.ndarray:
    """Of each state, the symbols to the nearest accepting one."""
    found = np.where(automaton.accepting, 0, np.iinfo(np.int32).max - 1)
    while True:
        ahead = np.where(automaton.transitions < 0, np.iinfo(np.int32).max - 1, found[automaton.transitions])
        shorter = np.minimum(found, ahead.min(1) + 1)
        if (shorter == found).all():
            return found
        found = shorter


def draw(automaton: Automaton, rng: random.Random, length: int) -> list[int]:
    """A random accepted text: a walk of `length` symbols, then the shortest way to an end."""
    ahead = distances(automaton)
    state, symbols = 0, []
    while len(symbols) < length or ahead[state]:
        row = automaton.transitions[state]
        ways = [s for s in np.flatnonzero(row >= 0) if len(symbols) < length or ahead[row[s]] < ahead[state]]
        if not ways:
            break
        symbols.append(int(rng.choice(ways)))
        state = row[symbols[-1]]
    return symbols


def classes(automaton: Automaton) -> int:
    """How many states differ in what follows them, by plain refinement."""
    block = np.unique(automaton.accepting, return_inverse=True)[1]
    while True:
        ahead = np.where(automaton.transitions < 0, -1, block[automaton.transitions])
        finer = np.unique(np.column_stack([block, ahead]), axis=0, return_inverse=True)[1].reshape(-1)
        if finer.max() == block.max():
            return int(finer.max()) + 1
        block = finer


def check(automaton: Automaton) -> None:
    """Minimal and trimmed."""
    reached, queue = {0}, [0]
    for state in queue:
        fresh = set(automaton.transitions[state].tolist()) - reached - {-1}
        reached |= fresh
        queue += fresh
    assert len(reached) == len(automaton.accepting) == len(automaton.transitions)
    assert (distances(automaton) < len(reached)).all()
    assert classes(automaton) == len(reached)


@QUICK
@given(pattern=patterns, seed=st.integers(0, 1000), length=st.integers(0, 12))
def test_what_is_drawn_is_valid_and_matches(pattern: str, seed: int, length: int) -> None:
    automaton = build(fullmatch(pattern))
    check(automaton)
    drawn = bytes(draw(automaton, random.Random(seed), length)).decode()
    assert automaton.accepts(drawn.encode())
    assert re.fullmatch(pattern, drawn)


@QUICK
@given(one=patterns, other=patterns, tail=patterns, data=st.data())
def test_both_is_the_conjunction(one: str, other: str, tail: str, data: st.DataObject) -> None:
    node = Repeat(sequence(Both((fullmatch(one), fullmatch(other))), ";", fullmatch(tail)), 1, 1)
    candidates = [data.draw(st.from_regex(p, fullmatch=True, alphabet="abé\n")) for p in (one, other)]
    end = data.draw(st.from_regex(tail, fullmatch=True, alphabet="abé"))
    common = [candidate for candidate in candidates if re.fullmatch(one, candidate) and re.fullmatch(other, candidate)]
    try:
        automaton = build(node)
    except ValueError:
        assert not common
        return
    check(automaton)
    for candidate in candidates:
        assert automaton.accepts(f"{candidate};{end}".encode()) == (candidate in common)


def test_both_within_a_repetition_and_of_an_empty_meeting() -> None:
    word = Both((Repeat(ANY, 2, 3), search("a"), search("^[ab]*$")))
    automaton = build(Repeat(sequence(word, ";")))
    for tried in ("", "ab;", "aab;ba;", "bb;", "a;", "ab", "aaaa;", "ab;ab;ac;"):
        assert automaton.accepts(tried.encode()) == bool(re.fullmatch("((?=[^;]*a)[ab]{2,3};)*", tried))
    assert build(choice(Both((text("a"), text("b"))), "c")).accepts(b"c")
    with pytest.raises(ValueError, match="at least one part"):
        build(Both(()))


@pytest.mark.parametrize(
    "ranges", [((0, LAST),), ((0x61, 0x62), (0x62, 0x7FE)), ((0xD000, 0xE001),), ((0x900, 0x40001),)]
)
def test_characters_in_utf8(ranges: tuple[tuple[int, int], ...]) -> None:
    automaton = build(Chars(ranges))
    check(automaton)
    for point in {*EDGES, *(edge + step for pair in ranges for edge in pair for step in (-1, 0, 1))}:
        if 0 <= point <= LAST and not 0xD800 <= point <= 0xDFFF:
            assert automaton.accepts(chr(point).encode()) == any(low <= point <= high for low, high in ranges)
    ways = automaton.accepting.astype(object)  # texts from each state on, by length
    total = 0
    for _ in range(5):
        total += ways[0]
        ways = (np.where(automaton.transitions < 0, 0, ways[automaton.transitions])).sum(1)
    points = {point for low, high in ranges for point in range(low, high + 1)} - set(range(0xD800, 0xE000))
    assert total == len(points)


@pytest.mark.parametrize(
    ("pattern", "states"),
    [("a*", 1), ("(a|b)*", 1), ("a{7}", 8), ("a{0,1000}", 1001), ("(?:aa)*|(?:aaa)*", 6), ("(a|b)*a(a|b){6}", 128)]
    + [("abc|abd|ab[cd]", 4), ("(xa*|ya*)", 2), ("ab|cb", 3), ("[^a]|a", 9), ("(?:.|\\n)*", 8)],
)
def test_sizes(pattern: str, states: int) -> None:
    assert len(build(fullmatch(pattern)).accepting) == states


@pytest.mark.parametrize("letters", [1, 2, 3])
@pytest.mark.parametrize("seed", range(40))
def test_the_smallest_automaton_of_a_random_one(letters: int, seed: int) -> None:
    rng = random.Random(seed)
    states = rng.choice([12, 40])
    half = [[rng.randrange(states) for _ in range(letters)] for _ in range(states)]
    table = [[to + states * rng.randrange(2) for to in half[state % states]] for state in range(2 * states)]
    final = [rng.random() < 0.1 or state == 0 for state in range(states)] * 2  # each state has a twin
    edges = [{to: sum(1 << i for i, at in enumerate(row) if at == to) for to in row} for row in table]
    large = trimmed(Deterministic(edges, final))
    assert large is not None
    small = smallest(large)
    rows = np.full((len(small.edges), letters), -1)
    for state, out in enumerate(small.edges):
        for to, symbols in out.items():
            rows[state, [bit for bit in range(letters) if symbols >> bit & 1]] = to
    automaton = Automaton(rows, np.array(small.accepting))
    check(automaton)
    for _ in range(50):
        word = rng.choices(range(letters), k=rng.randrange(20))
        at = 0
        for symbol in word:
            at = table[at][symbol]
        assert automaton.accepts(word) == final[at]


def test_equal_languages_have_equal_automata() -> None:
    one, other = (build(fullmatch(pattern)) for pattern in ("(?:a|bc)*", "(?:(?:bc)*a*)*"))
    assert (one.transitions == other.transitions).all()
    assert (one.accepting == other.accepting).all()


def test_special_tokens_are_symbols_of_their_own() -> None:
    automaton = build(sequence(Special("<q>"), Repeat(ANY), Special("<q>"), optional(Special("<e>"))))
    check(automaton)
    assert set(automaton.specials) == {"<q>", "<e>"}
    quote, end = (256 + automaton.specials.index(token) for token in ("<q>", "<e>"))
    assert automaton.transitions.shape[1] == 258
    assert automaton.accepts([quote, *"é<e>".encode(), quote])
    assert automaton.accepts([quote, quote, end])
    assert not automaton.accepts([quote, end, quote])
    assert not automaton.accepts(b"<q>a<q>")


def test_empty_and_nothing() -> None:
    assert build(EMPTY).accepts(b"")
    assert build(Repeat(NOTHING)).accepts(b"")
    assert build(Repeat(NOTHING, 0, 5)).accepts(b"")
    for node in (NOTHING, Chars(()), sequence("a", NOTHING), Repeat(NOTHING, 1), Repeat(text("a"), 2, 1)):
        with pytest.raises(ValueError, match="nothing can match"):
            build(node)


@pytest.mark.parametrize(
    "pattern",
    [
        "(a|b)*a(a|b){30}",
        "(a|b)*a(a|b){1000}",
        "((a{1,100}){1,100}){1,100}",
        "(a?){0,5000}",
        "(){1000000000}",
        "a{2001}",
    ]
    + ["(((a{0,50}){0,50}){0,50})*"],
)
def test_what_grows_too_large_stops_early(pattern: str) -> None:
    node = fullmatch(pattern)
    began = time.process_time()
    with pytest.raises(ValueError, match=r"more than 2000 states.*simplify"):
        build(node, limit=2000)
    assert time.process_time() - began < 3


def test_deep_and_shared_nodes() -> None:
    deep: Node = text("a")
    for _ in range(5000):
        deep = sequence(deep)
    with pytest.raises(ValueError, match="nested too deeply"):
        build(deep)
    same: Node = text("a")
    for _ in range(100):
        same = choice(same, same)
    assert len(build(same).accepting) == 2
    doubled: Node = text("a")
    for _ in range(100):
        doubled = sequence(doubled, doubled)
    with pytest.raises(ValueError, match="simplify"):
        build(doubled, limit=1000)


def test_many_words_and_long_strings() -> None:
    rng = random.Random(0)
    words = {"".join(rng.choices("abcdef", k=8)) for _ in range(300)}
    automaton = build(choice(*words))
    assert all(automaton.accepts(word.encode()) for word in words)
    assert not any(automaton.accepts(word[:-1].encode()) for word in words)
    string = build(sequence('"', Repeat(fullmatch(r'[^"\\]|\\.'), 0, 300), '"'))
    assert string.accepts(f'"{"é" * 300}"'.encode())
    assert not string.accepts(f'"{"é" * 301}"'.encode())
