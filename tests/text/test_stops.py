"""Stop strings across any cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgemma.text.stops import StopStrings


def run(stops: list[str], pieces: list[str]) -> tuple[str, str | None]:
    filter, out = StopStrings(stops), ""
    for piece in pieces:
        text, matched = filter.push(piece)
        out += text
        assert matched == filter.matched
    return out + filter.finish(), filter.matched


def by_character(stops: list[str], text: str) -> tuple[str, str | None]:
    """The first position at which the text read so far ends with a stop; of several, the longest."""
    for end in range(1, len(text) + 1):
        if hits := [stop for stop in stops if text[:end].endswith(stop)]:
            stop = max(hits, key=len)
            return text[: end - len(stop)], stop
    return text, None


def test_a_stop_that_crosses_a_canvas_border() -> None:
    filter = StopStrings(["\nUser:"])
    assert filter.push("Yes.\nUs") == ("Yes.", None)
    assert filter.push("er: and more") == ("", "\nUser:")
    assert filter.push("still more") == ("", "\nUser:")
    assert filter.finish() == ""


def test_what_was_held_comes_out_when_it_is_no_stop() -> None:
    filter = StopStrings("END")
    assert filter.push("the E") == ("the ", None)
    assert filter.push("ND of it"[1:]) == ("ED of it"[:1] + "D of it", None)
    assert filter.push("EN") == ("", None)
    assert filter.finish() == "EN"
    assert filter.finish() == ""


def test_the_stop_that_is_complete_first_wins() -> None:
    assert run(["abcd", "c"], ["abcd"]) == ("ab", "c")
    assert run(["bc", "abc"], ["xabc"]) == ("x", "abc")
    assert run(["aab"], ["aa", "a", "ab!"]) == ("aa", "aab")
    assert run([], ["any", "thing"]) == ("anything", None)


@given(st.lists(st.text("ab", min_size=1, max_size=4), max_size=4), st.lists(st.text("abc", max_size=5), max_size=8))
def test_no_cut_matters(stops: list[str], pieces: list[str]) -> None:
    assert run(stops, pieces) == by_character(stops, "".join(pieces))


def test_an_empty_stop_is_refused() -> None:
    with pytest.raises(ValueError, match="stop ''"):
        StopStrings(["a", ""])
