"""`dgemma run --trace` and `dgemma trace`: recorded with the embedded model, shown again without it."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image

import dgemma
from dgemma import cli, embedded
from dgemma.config import GenerationConfig
from dgemma.decoding.events import Block, Event, Finished, Prefilled, Step
from dgemma.decoding.trace import Header, Trace, Writer, read, to_json
from dgemma.terminal import export
from dgemma.terminal.layout import Style
from dgemma.terminal.replay import Spellings, describer, recording
from dgemma.terminal.screen import Screen
from dgemma.terminal.view import View
from dgemma.text.tokenizer import Tokenizer

from .conftest import CANVAS, END, Emulator, make_events

PUZZLE = "53..7.912 6..195..8 198...567 .5.76..23 4.68.3.91 7.39.4..6 9615..284 2.74196.5 3..28.1.9"
EVIL = "</script><script>alert(1)</script><b>&amp;@data@\x1b[2J"
VOID = {"meta", "input", "link", "br"}

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """`dgemma` with arguments, in this process: exit code, output, errors."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dgemma", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capsys.readouterr()  # type: ignore[return-value]

    return run


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Event], str]:
    """A trace of the Sudoku model, the events that it must hold, and the answer."""
    if "sudoku" not in embedded.names():
        pytest.skip("the embedded Sudoku model is not there")
    path = tmp_path_factory.mktemp("traces") / "sudoku.trace"
    lm = dgemma.load("sudoku")
    prompt = lm.task.prepare(PUZZLE)
    events = list(lm.stream(prompt, seed=3, max_denoising_steps=12))
    arguments = ["run", "-p", PUZZLE, "--seed", "3", "--steps", "12", "--trace", str(path)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["dgemma", *arguments])
        with pytest.raises(SystemExit):
            cli.main()
    return path, events, lm.result(events[-1]).text


@pytest.fixture
def evil(wide_tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A trace of two blocks whose text is markup, bytes and wide characters."""
    bytes_ = [wide_tokenizer.id(f"<0x{byte:02X}>") for byte in "语".encode()]
    first = [*wide_tokenizer.encode(EVIL), *bytes_, bytes_[0]]
    second = wide_tokenizer.encode("漢字 ]]> done")
    return write(tmp_path / "evil.trace", wide_tokenizer, make_events([[first[::-1], first], [second]]))


def write(path: Path, tokenizer: Tokenizer, events: list[Event]) -> Path:
    header = Header(f"model {EVIL}", len(tokenizer), CANVAS, asdict(GenerationConfig(eos_token_id=(END,))), 0, [2])
    with path.open("wb") as file:
        writer = Writer(file, header, describer(tokenizer))
        for event in events:
            writer.write(event)
    return path


def ids_of(page: str) -> dict[str, str]:
    """The elements of a page with an id, by their tags; every element must be closed where it was opened."""
    found: dict[str, str] = {}
    opened: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            values = dict(attributes)
            assert not {"src", "href"} & set(values), f"<{tag}> asks for something outside"
            if "id" in values:
                assert values["id"] not in found
                found[str(values["id"])] = tag
            if tag not in VOID:
                opened.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert opened.pop() == tag

    Reader().feed(page)
    assert opened == []
    return found


def data_of(page: str) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


class TestRecording:
    def test_run_records_what_happens(self, recorded: tuple[Path, list[Event], str]):
        path, events, _ = recorded
        trace = read(path)
        assert trace.problem is None
        assert [type(event) for event in trace.events] == [type(event) for event in events]
        for one, other in zip(events, trace.events, strict=True):
            if isinstance(one, Step):
                assert torch.equal(one.best, other.best)
                assert torch.equal(one.canvas, other.canvas)
                assert one.mean_entropy == other.mean_entropy
        lm = dgemma.load("sudoku")
        assert trace.header == Header(
            "sudoku",
            lm.model.config.vocab_size,
            lm.model.config.canvas_length,
            json.loads(json.dumps(asdict(lm.defaults.with_options(max_denoising_steps=12)))),
            3,
            lm.tokens(lm.task.prepare(PUZZLE)),
        )

    def test_of_an_answer_left_to_right(self, small_model: Path, tmp_path: Path, call: Call):
        path = tmp_path / "left.trace"
        options = ("--autoregressive", "-n", "7", "--trace", path)
        code, out, _ = call("run", small_model, "-p", "hello", *options)
        assert code == 0
        assert read(path).header.options["autoregressive"] is True
        assert call("trace", path)[:2] == (0, out)
        assert call("trace", path, "--html", tmp_path / "a.html", "--svg", tmp_path / "a.svg")[0] == 0
        assert data_of((tmp_path / "a.html").read_text("utf-8"))["text"].strip() == out.strip()
        ElementTree.parse(tmp_path / "a.svg")

    def test_a_folder_that_is_not_there(self, tmp_path: Path, call: Call):
        code, _, error = call("run", "-p", PUZZLE, "--trace", tmp_path / "none" / "a.trace")
        assert code == 2
        assert f"no folder {tmp_path / 'none'}" in error

    def test_tokens_read_as_in_the_tokenizer(self, wide_tokenizer: Tokenizer):
        describe = describer(wide_tokenizer)
        spellings = Spellings({i: describe(i) for i in range(len(wide_tokenizer))})
        bytes_ = [wide_tokenizer.id(f"<0x{byte:02X}>") for byte in "语a".encode()]
        for ids in ([2, *wide_tokenizer.encode("a 漢<turn|>\n"), *bytes_, 1], bytes_[:2], [*bytes_[1:], 40], []):
            assert spellings.decode(ids) == wide_tokenizer.decode(ids)
            assert spellings.decode(ids, skip_special=True) == wide_tokenizer.decode(ids, skip_special=True)


class TestReplay:
    def test_a_pipe_gets_the_text(self, recorded: tuple[Path, list[Event], str], call: Call):
        path, _, answer = recorded
        assert call("trace", path) == (0, answer.strip() + "\n", "")

    def test_a_terminal_sees_each_step_as_it_did(
        self,
        recorded: tuple[Path, list[Event], str],
        emulator: Callable[..., Emulator],
        monkeypatch: pytest.MonkeyPatch,
        call: Call,
    ):
        path, events, _ = recorded
        lm = dgemma.load("sudoku")
        first, second = emulator(80), emulator(80)
        View(Screen(first), lm.tokenizer, lm.defaults.eos_token_id, visual=True, pace=1e-9).show(events)
        monkeypatch.setattr(sys, "stdout", second)
        assert call("trace", path, "--pace", "0.001")[0] == 0
        timeless = [[re.sub(r"\d+ tok/s", "tok/s", text) for text in out.writes] for out in (first, second)]
        assert timeless[0] == timeless[1]
        assert len(second.writes) > sum(isinstance(event, Step) for event in events)

    def test_a_killed_run_shows_its_last_step_and_says_so(
        self, recorded: tuple[Path, list[Event], str], tmp_path: Path, call: Call
    ):
        lines = recorded[0].read_bytes().splitlines(keepends=True)
        kinds = [json.loads(line).get("kind") for line in lines]
        at = len(kinds) - kinds[::-1].index("step") - 1
        path = tmp_path / "killed.trace"
        path.write_bytes(b"".join(lines[: at + 1]) + lines[at + 1][:20])
        code, out, error = call("trace", path)
        assert (code, out) == (0, recorded[2].strip() + "\n")
        assert f"line {at + 2} is cut or damaged" in error
        path.write_bytes(lines[0])
        code, out, error = call("trace", path, "--html", tmp_path / "none.html", "--gif", tmp_path / "none.gif")
        assert (code, out) == (0, "")
        assert "ends before the generation does" in error

    def test_json_has_every_event(self, recorded: tuple[Path, list[Event], str], call: Call):
        _, out, _ = call("trace", recorded[0], "--json")
        assert [json.loads(line) for line in out.splitlines()] == [to_json(e) for e in read(recorded[0]).events]

    def test_a_row_of_several(self, wide_tokenizer: Tokenizer, tmp_path: Path, call: Call):
        texts = [wide_tokenizer.encode(text) for text in ("first", "second")]
        streams = [
            [replace(e, row=row) for e in make_events([[text]])] for row, text in zip((4, 7), texts, strict=True)
        ]
        path = write(tmp_path / "rows.trace", wide_tokenizer, [e for pair in zip(*streams, strict=True) for e in pair])
        assert call("trace", path)[1] == "first\n"
        assert call("trace", path, "--row", "7")[1] == "second\n"
        assert {json.loads(line)["row"] for line in call("trace", path, "--row", "7", "--json")[1].splitlines()} == {7}
        code, _, error = call("trace", path, "--row", "5")
        assert (code, error) == (1, "dgemma: the trace has no row 5, only 4, 7\n")

    @pytest.mark.parametrize("options", [("--pace", "61"), ("--json", "--pace", "1"), ("--json", "--html", "x.html")])
    def test_wrong_calls(self, options: tuple[str, ...], recorded: tuple[Path, list[Event], str], call: Call):
        code, out, error = call("trace", recorded[0], *options)
        assert (code, out) == (2, "")
        assert error.startswith("dgemma: --")

    def test_what_is_no_trace(self, tmp_path: Path, call: Call):
        (tmp_path / "a").write_text("hello")
        code, _, error = call("trace", tmp_path / "a")
        assert (code, error) == (
            1,
            f"dgemma: {tmp_path / 'a'}: not a trace: its first line is no dgemma-trace header\n",
        )
        assert call("trace", tmp_path / "b")[0] == 1


class TestPage:
    def test_what_it_shows(self, recorded: tuple[Path, list[Event], str], tmp_path: Path, call: Call):
        path, events, answer = recorded
        assert call("trace", path, "--html", tmp_path / "a.html")[:2] == (0, "")
        page = (tmp_path / "a.html").read_text("utf-8")
        found = ids_of(page)
        used = set(re.findall(r'\$\("(\w+)"\)', page))
        assert used <= set(found)
        data, steps = data_of(page), [event for event in events if isinstance(event, Step)]
        assert len(data["steps"]) == len(steps)
        for i, (drawn, step) in enumerate(zip(data["steps"], steps, strict=True)):
            assert drawn["accepted"] == int(step.accepted.sum())
            assert drawn["mean"] == pytest.approx(step.mean_entropy, abs=1e-4)
            assert drawn["entropy"] == pytest.approx(step.entropy.tolist(), rel=1e-3, abs=1e-4)
            for place, state in enumerate(drawn["states"]):
                changed = i > 0 and step.best[place] != steps[i - 1].best[place]
                assert state == ("c" if changed else "a" if step.accepted[place] else "r")
        last = data["steps"][-1]
        assert "".join(data["words"][word] for word in last["words"][: last["kept"]]).strip() == answer.strip()
        assert len(export.PAGE.encode()) < 30_000

    def test_text_cannot_leave_its_place(self, evil: Path, tmp_path: Path, call: Call):
        assert call("trace", evil, "--html", tmp_path / "a.html")[0] == 0
        page = (tmp_path / "a.html").read_text("utf-8")
        ids_of(page)
        assert page.count("<script") == page.count("</script") == 2
        assert "alert(1)</script>" not in page
        data = data_of(page)
        assert data["settled"] == ["", EVIL + "\ufffd" * 4]
        assert data["about"].startswith(f"model {EVIL} · ")
        shown = "".join(data["words"][word] for word in data["steps"][2]["words"])
        assert shown.startswith("漢字 ]]> done··")

    def test_a_character_of_several_bytes_stands_at_its_first(self, wide_tokenizer: Tokenizer):
        bytes_ = [wide_tokenizer.id(f"<0x{byte:02X}>") for byte in "语".encode()]
        assert export._texts([*wide_tokenizer.encode("a"), *bytes_, END], wide_tokenizer) == ["a", "语", "", "", "·"]

    def test_entropies_that_are_no_numbers(self, wide_tokenizer: Tokenizer, tmp_path: Path):
        events = make_events([[wide_tokenizer.encode("ab")]])
        events[1] = replace(events[1], entropy=torch.full((CANVAS,), torch.nan), mean_entropy=float("nan"))
        path = write(tmp_path / "nan.trace", wide_tokenizer, events)
        data = data_of(export.page(recording(read(path)), 0.1))
        assert data["steps"][0]["mean"] is None
        assert set(data["steps"][0]["entropy"]) == {None}


class TestPictures:
    @pytest.mark.parametrize("which", ["recorded", "evil"])
    def test_svg(self, which: str, request: pytest.FixtureRequest, tmp_path: Path, call: Call):
        source = request.getfixturevalue(which)
        path = source if which == "evil" else source[0]
        assert call("trace", path, "--svg", tmp_path / "a.svg", "--pace", "0.5")[0] == 0
        root = ElementTree.parse(tmp_path / "a.svg").getroot()
        name = {"svg": "http://www.w3.org/2000/svg"}
        frames = [g for g in root.findall("svg:g", name) if "frame" in g.get("class", "")]
        shown = recording(read(path))
        assert len(frames) == len(shown.steps)
        assert {element.tag.split("}")[1] for element in root.iter()} == {"svg", "style", "rect", "circle", "text", "g"}
        period = 0.5 * len(frames) + export.HOLD
        delays = [float(re.search(r"delay:(-[\d.]+)s", g.get("style", ""))[1]) for g in frames]
        assert delays == pytest.approx([0.5 * i - period for i in range(len(frames))])
        assert [g.get("class") for g in frames] == ["frame"] * (len(frames) - 1) + ["frame last"]
        for frame, panel in zip(frames, export.panels(shown), strict=True):
            text = "".join(e.text or "" for e in frame.iter("{http://www.w3.org/2000/svg}text"))
            drawn = panel.heading + "".join(c.text for row in panel.rows for c in row)
            assert re.sub(r"\s", "", text) == re.sub(r"\s", "", drawn)

    def test_a_strip_stands_side_by_side(self, evil: Path):
        panels = export.panels(recording(read(evil)))
        root = ElementTree.fromstring(export.strip("title", panels[1:], "a note"))
        texts = [(e.get("class"), float(e.get("x", 0)), e.text) for e in root.iter("{http://www.w3.org/2000/svg}text")]
        first, second = [x for kind, x, _ in texts if kind == "heading"]
        assert second - first == pytest.approx((panels[1].columns + 4) * export.CELL, abs=0.1)
        assert str(texts[-1][2]).strip() == "a note"
        assert "animation" not in export.strip("title", panels, "")

    def test_gif(self, recorded: tuple[Path, list[Event], str], tmp_path: Path, call: Call):
        assert call("trace", recorded[0], "--gif", tmp_path / "a.gif", "--pace", "0.3")[0] == 0
        steps = sum(isinstance(event, Step) for event in recorded[1])
        with Image.open(tmp_path / "a.gif") as image:
            assert image.n_frames == steps
            times = []
            for i in range(steps):
                image.seek(i)
                times.append(image.info["duration"])
                colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 16)}
                assert len(colours) > 4
        assert times == [300] * (steps - 1) + [2300]

    def test_gif_without_pillow(
        self,
        recorded: tuple[Path, list[Event], str],
        tmp_path: Path,
        call: Call,
        monkeypatch: pytest.MonkeyPatch,
    ):
        monkeypatch.setitem(sys.modules, "PIL", None)
        code, _, error = call("trace", recorded[0], "--gif", tmp_path / "a.gif")
        assert (code, error) == (1, "dgemma: a GIF needs pillow: pip install 'dgemma[media]'\n")
        assert not (tmp_path / "a.gif").exists()

    def test_long_texts_show_their_end(self, wide_tokenizer: Tokenizer, tmp_path: Path):
        lines = wide_tokenizer.encode("\n".join(str(n) for n in range(100)))
        path = write(tmp_path / "long.trace", wide_tokenizer, make_events([[lines]]))
        (panel,) = export.panels(recording(read(path)))
        assert len(panel.rows) == export.ROWS
        assert "".join(c.text for c in panel.rows[-1]) == "99"

    def test_a_later_block_stands_behind_the_settled_text(self, evil: Path):
        panel = export.panels(recording(read(evil)))[-1]
        styles = [c.style for row in panel.rows for c in row]
        assert styles[0] is Style.PLAIN
        assert styles[-1] is Style.ACCEPTED


def test_a_cut_row_is_completed_from_its_last_step(wide_tokenizer: Tokenizer):
    text = wide_tokenizer.encode("so far")
    events = make_events([[text], [text]])[:-2]  # the second block is not settled
    header = Header("m", 400, CANVAS, {"eos_token_id": [END]}, 0, [2])
    shown = recording(Trace(header, events, {}, "cut"))
    assert isinstance(shown.events[0], Prefilled)
    assert shown.events[-2] == Block(0, 1, text, 1, True, 0.0)
    assert isinstance(shown.events[-1], Finished)
    assert shown.events[-1].tokens == text * 2
