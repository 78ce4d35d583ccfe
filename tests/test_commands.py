"""`dgemma infill` and `dgemma edit`: once as processes, and in this one with a model of random weights."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest
from random_models import random_lm

from dgemma import cli, embedded, language_model

Call = Callable[..., tuple[int, str, str]]
TEXT = "the cat sat\nand the dog\nand sang\n"
needs_tiny = pytest.mark.skipif("tiny" not in embedded.names(), reason="the embedded model tiny is not there")


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """A command in this process, whatever its model: exit code, output, errors."""
    monkeypatch.setattr(language_model, "load", lambda *_: random_lm(40))

    def run(*arguments: str | Path, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dgemma", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(stdin.encode())))
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, error = capsys.readouterr()
        return int(ended.value.code or 0), out, error

    return run


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, "utf-8")
    path.chmod(0o640)
    return path


def middle(prefix: str, suffix: str, most: int = 64) -> str:
    return random_lm(40).infill(prefix, suffix, most).text


@needs_tiny
def test_a_marker_on_standard_input_is_filled_by_the_model_that_ships() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dgemma", "infill", "--lengths", "2,4", "--json"],
        input="def double(value):\n    return <fill>\n",
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert sorted(c["length"] for c in found["candidates"]) == [2, 4]
    assert found["text"] == found["candidates"][0]["text"]


@pytest.mark.parametrize("command", ["infill", "edit"])
def test_help_needs_no_torch(command: str) -> None:
    code = (
        f"import sys; sys.argv = ['dgemma', '{command}', '--help']\nfrom dgemma import cli\n"
        "try: cli.main()\nexcept SystemExit: sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_a_place_or_a_range_or_a_marker_names_the_gap(call: Call, file: Path) -> None:
    assert call("infill", file, "--at", "2:5", "-n", 4)[1].rstrip("\n") == middle(TEXT[:16], TEXT[16:], 4).rstrip("\n")
    told = call("infill", file, "--at", "2:5", "--end", "3:4", "-n", 4)
    assert told[1].rstrip("\n") == middle(TEXT[:16], TEXT[27:], 4).rstrip("\n")
    end = call("infill", file, "--at", "1:12", "-n", 4)
    assert end[1].rstrip("\n") == middle(TEXT[:11], TEXT[11:], 4).rstrip("\n")
    marked = call("infill", "-", "--marker", "[..]", "-n", 4, stdin=TEXT[:16] + "[..]" + TEXT[16:])
    assert marked[1].rstrip("\n") == middle(TEXT[:16], TEXT[16:], 4).rstrip("\n")
    assert call("infill", "sudoku", file, "--at", "2:5", "-n", 4)[0] == 0
    assert file.read_text("utf-8") == TEXT


def test_all_candidates_are_told(call: Call, file: Path) -> None:
    code, out, _ = call("infill", file, "--at", "2:5", "--lengths", "3,1,2", "--all")
    found = random_lm(40).infill(TEXT[:16], TEXT[16:], lengths=[1, 2, 3])
    header, *rows = out.splitlines()
    assert (code, header.split()) == (0, ["tokens", "log", "p", "steps", "text"])
    assert [json.loads(row.split(maxsplit=3)[3]) for row in rows] == [c.text for c in found.candidates]


def test_write_replaces_the_file_at_once_and_keeps_its_mode(
    call: Call, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = file.with_name("link.txt")
    link.symlink_to(file)
    assert call("infill", link, "--at", "2:5", "--write", "-n", 4) == (0, "", "")
    assert file.read_text("utf-8") == TEXT[:16] + middle(TEXT[:16], TEXT[16:], 4) + TEXT[16:]
    assert link.is_symlink()
    assert file.stat().st_mode & 0o777 == 0o640

    file.write_text(TEXT, "utf-8")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no room")))
    code, _, error = call("infill", file, "--at", "2:5", "--write", "-n", 4)
    assert (code, error) == (1, "dgemma: no room\n")
    assert file.read_text("utf-8") == TEXT
    assert sorted(p.name for p in file.parent.iterdir()) == ["link.txt", "text.txt"]


def test_a_suffix_that_is_told_in_the_prompt_is_noted(call: Call) -> None:
    code, out, error = call("infill", "-", "-n", 4, stdin="the cat <fill>" + " sang" * 60)
    assert (code, bool(out)) == (0, True)
    assert "the suffix does not fit the canvas" in error


def test_edit_prints_a_diff_or_applies_it(call: Call, file: Path) -> None:
    made = random_lm(40).edit(TEXT, [(12, 23)], seed=2)
    assert call("edit", file, "--lines", "2:2", "--seed", 2) == (0, made.diff(str(file)), "")
    assert made.diff()
    assert json.loads(call("edit", file, "--lines", "2", "--seed", 2, "--json")[1])["text"] == made.text
    assert file.read_text("utf-8") == TEXT
    assert call("edit", file, "--lines", "2", "--seed", 2, "--write")[0] == 0
    assert file.read_text("utf-8") == made.text
    assert made.text.split("\n")[0] + made.text[-10:] == "the cat sat\nand sang\n"


def test_edit_takes_several_ranges_and_an_instruction(call: Call, file: Path) -> None:
    made = random_lm(40).edit(TEXT, [(0, 11), (24, 32)], "Sing.", 0.5)
    told = call("edit", file, "--lines", "1:1", "--lines", "3", "--instruction", "Sing.", "--noise", "0.5")
    assert told == (0, made.diff(str(file)), "")


def test_line_ends_are_kept(call: Call, file: Path) -> None:
    file.write_bytes(b"the cat\r\nthe dog\r\n")
    assert call("edit", file, "--lines", "2", "--write")[0] == 0
    assert file.read_bytes().startswith(b"the cat\r\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["infill", "FILE"], "<fill> once, not 0 times"),
        (["infill", "FILE", "--marker", "the"], "the once, not 2 times"),
        (["infill", "FILE", "--at", "2"], "LINE:COL"),
        (["infill", "FILE", "--at", "0:1"], "numbers from 1"),
        (["infill", "FILE", "--at", "9:1"], "has 4 lines"),
        (["infill", "FILE", "--at", "1:13"], "ends at column 12"),
        (["infill", "FILE", "--at", "2:1", "--end", "1:1"], "lies before"),
        (["infill", "FILE", "--end", "1:1"], "--end needs --at"),
        (["infill", "FILE", "--at", "1:1", "--marker", "x"], "no effect"),
        (["infill", "FILE", "--at", "1:1", "--lengths", "a"], "8,16"),
        (["infill", "FILE", "--at", "1:1", "--lengths", "2", "-n", "3"], "exclude"),
        (["infill", "FILE", "--at", "1:1", "--all", "--json"], "exclude"),
        (["infill", "-", "--write"], "--write needs a FILE"),
        (["infill", "a", "b", "c"], "'c' is one more"),
        (["infill", "nowhere.txt"], "nowhere.txt: No such file"),
        (["edit", "FILE"], "--lines, --instruction"),
        (["edit", "FILE", "--lines", "3:2"], "FIRST:LAST"),
        (["edit", "FILE", "--lines", "1:4"], "has 3 lines"),
        (["edit", "FILE", "--lines", "1", "--noise", "0"], "--noise"),
        (["edit", "FILE", "--lines", "1", "-n", "3"], "no effect"),
        (["edit", "FILE", "--instruction", "x", "--prompt", "y"], "exclude"),
        (["edit", "FILE", "--lines", "1", "--json", "--write"], "exclude"),
        (["edit", "-", "--noise", "0.5"], "is empty"),
    ],
)
def test_a_wrong_call_is_one_line(call: Call, file: Path, arguments: list[str], message: str) -> None:
    code, out, error = call(*(str(file) if a == "FILE" else a for a in arguments))
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert message in error
    assert file.read_text("utf-8") == TEXT


def test_bytes_that_are_no_text_are_refused(call: Call, file: Path) -> None:
    file.write_bytes(b"\xff\xfe")
    assert call("edit", file, "--lines", "1") == (2, "", f"dgemma: {file} is not UTF-8 text\n")
