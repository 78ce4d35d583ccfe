"""Widths are held against wcwidth, which the code does not use."""

import unicodedata

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from wcwidth import wcswidth, wcwidth

from dgemma.terminal.layout import Style, cells, clean, flow, paint, wrap

PLAIN = Style.PLAIN


def rows(text: str, columns: int) -> list[str]:
    return ["".join(cluster.text for cluster in row) for row in wrap([(text, PLAIN)], columns)]


def test_control_characters_become_pictures():
    assert clean("a\x1b[31mb\x07\x7f\x9b2J\r\nc\td\r") == "a␛[31mb␇␡\ufffd2J\nc\td␍"


def test_characters_that_reorder_a_line_are_dropped():
    assert clean("a\u202eb\u2066c\u2069") == "abc"
    assert clean("\u05d0\u200f") == "\u05d0\u200f"  # a mark that ordinary Hebrew text has


@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8")))
def test_nothing_that_a_terminal_obeys_is_left(text: str):
    assert not [c for c in clean(text) if unicodedata.category(c) in ("Cc", "Zl", "Zp") and c not in "\n\t"]


SCRIPTS = st.text(st.sampled_from("ab c漢字한👍👩🏽❤🇳क्षि\u200d\ufe0f\u0301\n"), max_size=60)


@settings(deadline=None)
@given(SCRIPTS, st.sampled_from([2, 5, 20, 40, 80]))
def test_no_row_is_wider_than_the_terminal(text: str, columns: int):
    for row in rows(text, columns):
        assert cells(row) <= columns
        assert wcswidth(row) <= columns
        assert sum(max(0, wcwidth(c)) for c in row) <= columns  # a terminal that knows no emoji sequences


@settings(deadline=None)
@given(SCRIPTS)
def test_only_blanks_are_lost_in_wrapping(text: str):
    joined = "".join(rows(text, 20))
    assume("\ufffd" not in joined)  # a chain of joined emoji, wider than the terminal
    assert joined.replace(" ", "") == text.replace(" ", "").replace("\n", "")


def test_words_stay_whole_where_they_fit():
    assert rows("one two three four", 9) == ["one two ", "three ", "four"]
    assert rows("abcdefghij klm", 4) == ["abcd", "efgh", "ij ", "klm"]


def test_a_blank_that_does_not_fit_is_dropped():
    assert rows("abcd efgh", 4) == ["abcd", "efgh"]


def test_wide_characters_break_anywhere_and_are_never_halved():
    assert rows("漢字漢字漢", 5) == ["漢字", "漢字", "漢"]
    assert rows("ab漢字cd", 4) == ["ab漢", "字cd"]


@pytest.mark.parametrize("cluster", ["e\u0301", "👩\u200d👩", "👍🏽", "❤\ufe0f", "न\u094d"])
def test_a_character_of_several_code_points_is_not_torn(cluster: str):
    for columns in range(5, 12):
        assert all(row.count(cluster) * len(cluster) == len(row) for row in rows(cluster * 9, columns))


def test_combining_characters_join_across_pieces():
    row = wrap([("e", Style.ACCEPTED), ("\u0301", Style.RENOISED)], 10)[0]
    assert [(c.text, c.style) for c in row] == [("e\u0301", Style.ACCEPTED)]


def test_a_tab_reaches_the_next_stop():
    assert rows("ab\tc", 20) == ["ab      c"]
    assert rows("12345678\tc", 20) == ["12345678        c"]


def test_line_breaks_make_rows():
    assert rows("a\n\nb\n", 10) == ["a", "", "b", ""]


def test_what_no_row_can_hold_is_replaced():
    assert rows("a" + "👩\u200d" * 20 + "👩b", 10) == ["a\ufffdb"]


def test_flow_fills_rows_with_whole_parts():
    assert flow(["block 1", "step 2", "T 0.5"], 20) == ["block 1 · step 2", "T 0.5"]
    assert flow(["a part that is too long"], 6) == ["a part"]


def test_each_run_of_a_style_is_closed():
    pieces = [("a", Style.ACCEPTED), ("b", Style.ACCEPTED), ("c", PLAIN), ("d", Style.RENOISED)]
    assert paint(pieces, colour=True) == "\x1b[32mab\x1b[0mc\x1b[2;35md\x1b[0m"
    assert paint(pieces, colour=False) == "\x1b[1mab\x1b[0mc\x1b[2md\x1b[0m"
