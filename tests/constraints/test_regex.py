"""Patterns against Python's own engine, and what is refused."""

import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dgemma.constraints import nodes
from dgemma.constraints.automaton import Automaton, build
from dgemma.constraints.regex import fullmatch, search

ALPHABET = "ab0_ \n-.é€😀"
QUICK = settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))

atoms = st.sampled_from(
    [*map(re.escape, ALPHABET), ".", "[ab]", "[^ab]", "[a-c0]", "[^\\d_]", "[\\w-]", "[é-€]", "[^\\W0]", "[\\s\\S]"]
    + ["\\d", "\\D", "\\w", "\\W", "\\s", "\\S", "\\u00e9", "\\x61", "[\\U0001F600-\\U0001F64F]", "()"]
)
quantifiers = st.sampled_from(["*", "+", "?", "*?", "+?", "??", "{2}", "{1,3}", "{2,}", "{,2}?", "{0}"])
patterns = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=4).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda options: f"(?:{'|'.join(options)})"),
        st.builds("({}){}".format, inner, quantifiers),
    ),
    max_leaves=8,
)
anchored = st.lists(
    st.builds("{}(?:{}){}".format, st.sampled_from(["", "^"]), patterns, st.sampled_from(["", "$"])),
    min_size=1,
    max_size=3,
).map("|".join)
texts = st.text(ALPHABET, max_size=8)


def accepts(automaton: Automaton, text: str) -> bool:
    return automaton.accepts(text.encode())


def python(pattern: str) -> re.Pattern[str]:
    """`$` is the very end in ECMA-262, and may stand before a last line feed in Python."""
    return re.compile(pattern.replace("$", r"\Z"), re.ASCII)


@QUICK
@given(pattern=patterns, text=texts, data=st.data())
def test_fullmatch_is_what_python_matches_from_end_to_end(pattern: str, text: str, data: st.DataObject) -> None:
    automaton = build(fullmatch(pattern))
    assert accepts(automaton, text) == bool(python(pattern).fullmatch(text))
    matching = data.draw(st.from_regex(python(pattern), fullmatch=True, alphabet=st.characters(codec="utf-8")))
    assert accepts(automaton, matching)
    assert accepts(automaton, matching[:-1]) == bool(python(pattern).fullmatch(matching[:-1]))


@QUICK
@given(pattern=anchored, text=texts, data=st.data())
def test_search_is_what_python_finds(pattern: str, text: str, data: st.DataObject) -> None:
    automaton = build(search(pattern))
    found = data.draw(st.from_regex(python(pattern), alphabet=st.characters(codec="utf-8")))
    for tried in (text, found, "b" + found, found + "b", found[1:]):
        assert accepts(automaton, tried) == bool(python(pattern).search(tried))


@QUICK
@given(pattern=anchored, text=texts)
def test_anchors_add_nothing_to_a_full_match(pattern: str, text: str) -> None:
    assert accepts(build(fullmatch(pattern)), text) == bool(python(pattern).fullmatch(text))


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("^(?:a|b$)", ["a", "ab", "b"], ["ba", "bb", "ca"]),
        ("(^|,)a(,|$)", ["a", "a,b", "b,a", "c,a,d"], ["ab", "ba", "b,ab"]),
        ("^a|b$|c", ["ab", "a", "bb", "xcx"], ["ba", ""]),
        ("^$", [""], ["a", "\n"]),
        ("a$", ["a", "ba"], ["a\n"]),
        ("a$|a$", ["ba"], ["ab"]),
        ("", ["", "anything"], []),
        (r"\Aa\Z", ["a"], ["aa"]),
        (r"^(?P<year>\d{4})-(?:\d\d)$", ["2024-01"], ["2024-1", "٢٠٢٤-01"]),
        (r"(?x) ^ a b  # blanks do not count", ["ab", "abc"], ["a b"]),
        (r"^[\]\-\\]+$", ["]-\\"], ["a"]),
    ],
)
def test_search_by_example(pattern: str, yes: list[str], no: list[str]) -> None:
    automaton = build(search(pattern))
    assert all(accepts(automaton, text) for text in yes)
    assert not any(accepts(automaton, text) for text in no)


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        (r"(a)\1", "backreference"),
        (r"(?P<x>a)(?P=x)", "backreference"),
        ("(?=a)b", "lookaround"),
        ("(?<!a)b", "lookaround"),
        ("(a)?(?(1)b|c)", "conditional group"),
        (r"\bword", "word boundary"),
        (r"a\B", "word boundary"),
        ("a^b", "anchor"),
        ("(a$)b", "anchor"),
        ("(?:^a)+", "anchor"),
        ("$a", "anchor"),
        ("a*+", "possessive"),
        ("(?>a)b", "atomic"),
        ("(?i)a", "IGNORECASE"),
        ("x(?s:.)", "DOTALL"),
        ("(?u:a)", "UNICODE"),
        ("(?m)^a", "MULTILINE"),
        ("(a", "missing \\)"),
        ("[b-a]", "bad character range b-a"),
        ("a**", "multiple repeat"),
        (r"\p{L}", r"bad escape \\p"),
        ("a{3,2}", "min repeat greater than max"),
        ("a{99999999999}", "too large"),
        ("(" * 5000 + "a" + ")" * 5000, "nested too deeply"),
    ],
)
def test_refusals_name_what_is_wrong(pattern: str, why: str) -> None:
    for read in (fullmatch, search):
        with pytest.raises(ValueError, match=why):
            read(pattern)


def test_characters_are_code_points_and_surrogates_none() -> None:
    automaton = build(fullmatch("."))
    assert accepts(automaton, "😀")
    assert not accepts(automaton, "\n")
    assert not automaton.accepts("\ud800".encode(errors="surrogatepass"))
    with pytest.raises(ValueError, match="nothing can match"):
        build(fullmatch("[\\ud800-\\udfff]"))


def test_classes_are_in_order_and_without_overlap() -> None:
    assert fullmatch("[b-da-cx]") == nodes.Sequence(
        (nodes.Sequence((nodes.EMPTY, nodes.Chars(((97, 100), (120, 120))), nodes.EMPTY)),)
    )
