"""The view fed with made-up events, on emulated terminals."""

import re
import unicodedata
from collections.abc import Callable, Iterator
from itertools import count

import pytest

from dgemma.decoding.events import Event
from dgemma.terminal.screen import Screen
from dgemma.terminal.view import FRAMES_A_SECOND, View
from dgemma.text.tokenizer import Tokenizer

from .conftest import END, Emulator, make_events, make_step

Make = Callable[..., Emulator]
TEXT = "The answer: 漢字漢字漢字 and 👍👍👍👍👍👍 then e\u0301e\u0301e\u0301 until it is full.\n\nA second paragraph."
NOISE = "x漢y" * 30
SGR = re.compile(r"\x1b\[([\d;]*)m")


@pytest.fixture
def slow_clock() -> Callable[[], float]:
    """Each look at it is a second later: every step is drawn."""
    ticks = count()
    return lambda: float(next(ticks))


def reading(screen: list[str]) -> str:
    """Text without the blanks that wrapping and double cells put in or leave out."""
    return unicodedata.normalize("NFC", re.sub(r"\s", "", "".join(screen)))  # pyte composes accents


def pairs(tokenizer: Tokenizer, *texts: str) -> list[list[int]]:
    return [tokenizer.encode(text) for text in texts]


@pytest.mark.parametrize("columns", [20, 40, 80])
def test_each_frame_replaces_the_one_before(columns: int, emulator: Make, wide_tokenizer: Tokenizer, slow_clock):
    out = emulator(columns, 30)
    out.write("before\n")
    view = View(Screen(out), wide_tokenizer, (END,), visual=True, clock=slow_clock)
    seen = []

    def watched() -> Iterator[Event]:
        for event in make_events([pairs(wide_tokenizer, NOISE, "漢" * 55, "short", TEXT)]):
            yield event
            seen.append(out.lines)

    finished = view.show(watched())
    for text, lines in zip((NOISE, "漢" * 55, "short", TEXT), seen[1:], strict=False):
        assert lines[0] == "before"
        canvas, status = lines[1:], []
        while not status or not status[0].startswith("block"):
            status.insert(0, canvas.pop())
        assert reading(canvas) == reading([text])
        assert " ".join(status).startswith("block 1 · step")
        assert all(part in reading(status) for part in ("T0.75", "H0.125", "tok/s"))
    assert out.lines[0] == "before"
    assert reading(out.lines[1:]) == reading([TEXT])
    assert (out.screen.cursor.x, out.screen.cursor.y) == (0, len(out.lines))
    assert finished.tokens == wide_tokenizer.encode(TEXT)


def test_short_lines_stay_as_they_are(emulator: Make, wide_tokenizer: Tokenizer, slow_clock):
    grid = "123\n456\n789"
    out = emulator(20, 24)
    View(Screen(out), wide_tokenizer, (END,), visual=True, clock=slow_clock).show(
        make_events([pairs(wide_tokenizer, "111\n111\n111", grid)])
    )
    assert out.lines == grid.split("\n")


def test_a_frame_is_one_write(emulator: Make, wide_tokenizer: Tokenizer, slow_clock):
    out = emulator(40)
    View(Screen(out), wide_tokenizer, (END,), visual=True, clock=slow_clock).show(
        make_events([pairs(wide_tokenizer, "abc", "abd", "abe")])
    )
    assert [("step" in write) for write in out.writes[:3]] == [True] * 3
    assert len([write for write in out.writes if "step" in write]) == 3


def test_accepted_changed_and_renoised_differ_in_colour(emulator: Make, wide_tokenizer: Tokenizer, slow_clock):
    out = emulator(80)
    view = View(Screen(out), wide_tokenizer, (END,), visual=True, clock=slow_clock)
    view._take(make_step(wide_tokenizer.encode("abc"), 1, accepted=[True, True, False]))
    view._take(make_step(wide_tokenizer.encode("axc"), 2, accepted=[True, True, False]))
    cells = [out.screen.buffer[0][x] for x in range(3)]
    assert [cell.data for cell in cells] == ["a", "x", "c"]
    assert [cell.fg for cell in cells] == ["green", "brown", "magenta"]  # pyte calls yellow brown


def test_without_colour_they_differ_in_style(
    emulator: Make, wide_tokenizer: Tokenizer, slow_clock, monkeypatch: pytest.MonkeyPatch
):
    out = emulator(80)
    monkeypatch.setenv("NO_COLOR", "1")
    view = View(Screen(out), wide_tokenizer, (END,), visual=True, clock=slow_clock)
    view._take(make_step(wide_tokenizer.encode("abc"), 1, accepted=[True, True, False]))
    view._take(make_step(wide_tokenizer.encode("axc"), 2, accepted=[True, True, False]))
    cells = [out.screen.buffer[0][x] for x in range(3)]
    assert [(cell.bold, cell.underscore) for cell in cells] == [(True, False), (False, True), (False, False)]
    assert {cell.fg for cell in cells} == {"default"}
    assert "\x1b[2mc\x1b[0m" in out.writes[1]  # dim, which pyte does not know
    assert {code for write in out.writes for code in SGR.findall(write)} <= {"0", "1", "2", "4"}


def test_an_empty_no_color_forbids_nothing(emulator: Make, monkeypatch: pytest.MonkeyPatch):
    out = emulator(80)
    monkeypatch.setenv("NO_COLOR", "")
    assert Screen(out).colour


def test_frames_are_limited_but_the_last_step_is_drawn(emulator: Make, wide_tokenizer: Tokenizer):
    time = [0.0]
    out = emulator(80)
    view = View(Screen(out), wide_tokenizer, (END,), visual=True, clock=lambda: time[0])
    texts = [f"step{n:03}" for n in range(200)]

    def events() -> Iterator[Event]:
        for event in make_events([pairs(wide_tokenizer, *texts)]):
            time[0] += 0.01
            yield event

    view.show(events())
    frames = [write for write in out.writes if "block 1" in write]
    assert 20 < len(frames) <= 2 * FRAMES_A_SECOND + 2
    assert "step 200" in frames[-1]


def test_of_a_canvas_taller_than_the_terminal_its_top_is_shown(emulator: Make, wide_tokenizer: Tokenizer, slow_clock):
    out = emulator(40, 10)
    text = "\n".join(str(n) for n in range(30))
    view = View(Screen(out), wide_tokenizer, (END,), visual=True, clock=slow_clock)
    view._take(make_step(wide_tokenizer.encode(text)))
    view._take(make_step(wide_tokenizer.encode(text), 2))
    assert out.lines[:3] == ["0", "1", "2"]
    status = next(i for i, line in enumerate(out.lines) if line.startswith("block"))
    assert out.lines[status - 1] == f"… {30 - (status - 1)} more lines"
    assert out.scrolled == []
    out = emulator(40, 10)
    View(Screen(out), wide_tokenizer, (END,), visual=True, clock=slow_clock).show(
        make_events([[wide_tokenizer.encode(text)]])
    )
    assert out.scrolled + out.lines == text.split("\n")


def test_a_mark_that_is_spelled_out_is_text(emulator: Make, wide_tokenizer: Tokenizer):
    spelled = "<|channel>thought is a mark, <tool_call|> and <turn|> are others"
    out = emulator(80)
    tokens = wide_tokenizer.encode(wide_tokenizer.plain(spelled))
    assert not wide_tokenizer.special_ids & set(tokens)
    View(Screen(out), wide_tokenizer, (END,)).show(make_events([[tokens]]))
    assert out.lines == [spelled]


@pytest.mark.parametrize(("columns", "rows"), [(1, 1), (2, 2), (3, 1), (7, 2)])
def test_a_tiny_terminal_is_no_error(columns: int, rows: int, emulator: Make, wide_tokenizer: Tokenizer, slow_clock):
    out = emulator(columns, rows)
    blocks = [pairs(wide_tokenizer, "one two", "one 漢字 two"), pairs(wide_tokenizer, "three", "four\nfive")]
    View(Screen(out), wide_tokenizer, (END,), visual=True, clock=slow_clock).show(make_events(blocks))
    assert re.sub("[^a-z]", "", "".join(out.scrolled + out.lines)) == "onetwofourfive"


@pytest.mark.parametrize("columns", [20, 40, 80])
@pytest.mark.parametrize("rows", [6, 24])
def test_blocks_that_are_settled_scroll_up_and_stay(
    columns: int, rows: int, emulator: Make, wide_tokenizer: Tokenizer, slow_clock
):
    out = emulator(columns, rows)
    texts = ["One line.\nA word over the bor", "der of blocks 漢字\n\n", "a long para" + "graph " * 40, "ends.\nDone"]
    View(Screen(out), wide_tokenizer, (END,), visual=True, clock=slow_clock).show(
        make_events([pairs(wide_tokenizer, NOISE, text) for text in texts])
    )
    whole = out.scrolled + out.lines
    assert reading(whole) == reading(texts)
    assert whole[0] == "One line."
    assert "A word over the border of blocks"[: columns // 2] in whole[1]
    assert whole[-1] == "Done"


def test_a_terminal_made_narrower_keeps_no_remains(emulator: Make, wide_tokenizer: Tokenizer, slow_clock):
    out = emulator(40, 20)
    view = View(Screen(out), wide_tokenizer, (END,), visual=True, clock=slow_clock)
    view._take(make_step(wide_tokenizer.encode("abcdefghi " * 6)))
    frame = out.writes[-1]
    out.resize(15, 20)
    out.stream.feed(frame)  # a terminal that wraps what it has shown
    assert len(out.lines) > 8
    view._take(make_step(wide_tokenizer.encode("new"), 2))
    assert out.lines[0] == "new"
    assert out.lines[1] == "block 1"
    assert "abcdefghi" not in "".join(out.lines)


class TestPlain:
    """No live terminal: only settled text, block after block."""

    blocks = ("One ", "two\n", "thr", "ee")

    def test_a_pipe_gets_the_text_and_nothing_else(self, emulator: Make, wide_tokenizer: Tokenizer):
        out = emulator(tty=False)
        events = make_events([pairs(wide_tokenizer, NOISE, text) for text in self.blocks])
        View(Screen(out), wide_tokenizer, (END,), visual=True).show(events)
        assert out.writes == [*self.blocks, "\n"]

    def test_a_dumb_terminal_too(self, emulator: Make, wide_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
        out = emulator()
        monkeypatch.setenv("TERM", "dumb")
        events = make_events([pairs(wide_tokenizer, NOISE, text) for text in self.blocks])
        View(Screen(out), wide_tokenizer, (END,), visual=True).show(events)
        assert out.writes == [*self.blocks, "\n"]

    def test_a_terminal_without_visual_too(self, emulator: Make, wide_tokenizer: Tokenizer):
        out = emulator()
        events = make_events([pairs(wide_tokenizer, NOISE, text) for text in self.blocks])
        View(Screen(out), wide_tokenizer, (END,)).show(events)
        assert out.writes == [*self.blocks, "\n"]

    def test_the_last_line_is_not_ended_twice(self, emulator: Make, wide_tokenizer: Tokenizer):
        out = emulator(tty=False)
        View(Screen(out), wide_tokenizer, (END,)).show(make_events([pairs(wide_tokenizer, "end\n")]))
        assert "".join(out.writes) == "end\n"

    def test_no_half_characters_at_the_border_of_blocks(self, emulator: Make, wide_tokenizer: Tokenizer):
        out = emulator(tty=False)
        bytes_ = [wide_tokenizer.id(f"<0x{byte:02X}>") for byte in "语".encode()]
        texts = [[*wide_tokenizer.encode("a"), *bytes_[:2]], [bytes_[2], *wide_tokenizer.encode("b")]]
        View(Screen(out), wide_tokenizer, (END,)).show(make_events([[text] for text in texts]))  # type: ignore[list-item]
        assert out.writes == ["a", "语b", "\n"]


@pytest.mark.parametrize("visual", [True, False])
@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_the_model_cannot_command_the_terminal(
    visual: bool, term: str, emulator: Make, wide_tokenizer: Tokenizer, slow_clock, monkeypatch: pytest.MonkeyPatch
):
    out = emulator()
    monkeypatch.setenv("TERM", term)
    evil = wide_tokenizer.encode("a\x1b]0;owned\x9b2Jb")
    View(Screen(out), wide_tokenizer, (END,), visual=visual, clock=slow_clock).show(make_events([[evil, evil]]))
    raw = "".join(out.writes)
    assert "\x1b]" not in raw
    assert "\x9b" not in raw
    assert out.lines == ["a␛]0;owned\ufffd2Jb"]


def test_a_pipe_gets_control_characters_as_they_are(emulator: Make, wide_tokenizer: Tokenizer):
    out = emulator(tty=False)
    View(Screen(out), wide_tokenizer, (END,)).show(make_events([pairs(wide_tokenizer, "a\x1bb")]))
    assert "".join(out.writes) == "a\x1bb\n"


class TestThoughts:
    tokens = "<|channel>thought\nhm, hm<channel|>Yes.<turn|>"

    @pytest.mark.parametrize("visual", [True, False])
    def test_a_terminal_shows_them_faint_before_the_answer(
        self, visual: bool, emulator: Make, wide_tokenizer: Tokenizer, slow_clock
    ):
        out = emulator()
        View(Screen(out), wide_tokenizer, (END,), visual=visual, clock=slow_clock).show(
            make_events([pairs(wide_tokenizer, self.tokens)])
        )
        assert out.lines == ["hm, hm", "", "Yes."]
        raw = "".join(out.writes[1:] if visual else out.writes)
        assert "\x1b[2mhm, hm" in raw
        assert "\x1b[2mYes." not in raw

    def test_a_pipe_has_the_answer_alone(self, emulator: Make, wide_tokenizer: Tokenizer):
        out, aside = emulator(tty=False), emulator(tty=False)
        View(Screen(out), wide_tokenizer, (END,), aside=Screen(aside)).show(
            make_events([pairs(wide_tokenizer, self.tokens)])
        )
        assert "".join(out.writes) == "Yes.\n"
        assert "".join(aside.writes) == "hm, hm\n\n"


def test_a_tool_call_is_shown(emulator: Make, wide_tokenizer: Tokenizer):
    out = emulator(tty=False)
    call = '<|tool_call>call:f{city:<|"|>Oslo<|"|>}<tool_call|>'
    View(Screen(out), wide_tokenizer, (END,)).show(make_events([pairs(wide_tokenizer, call)]))
    assert "".join(out.writes) == 'f({"city": "Oslo"})\n'


@pytest.mark.parametrize("visual", [True, False])
def test_an_interrupt_leaves_what_is_settled(visual: bool, emulator: Make, wide_tokenizer: Tokenizer, slow_clock):
    out = emulator(20)

    def events() -> Iterator[Event]:
        yield from make_events([pairs(wide_tokenizer, "settled\nand more")])[:-1]
        yield make_step(wide_tokenizer.encode(NOISE), 1, block=1)
        raise KeyboardInterrupt

    view = View(Screen(out), wide_tokenizer, (END,), visual=visual, clock=slow_clock)
    with pytest.raises(KeyboardInterrupt):
        view.show(events())
    assert out.lines == ["settled", "and more"]
    assert (out.screen.cursor.x, out.screen.cursor.y) == (0, 2)
