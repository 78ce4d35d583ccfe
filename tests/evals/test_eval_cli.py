"""`dgemma eval`: once as a process of its own, and what it says to wrong calls."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from dgemma import cli, embedded, language_model
from dgemma.evals import tasks
from dgemma.evals.tasks import Answer, Item, Score
from dgemma.language_model import LanguageModel

Call = Callable[..., tuple[int, str, str]]
PART = {"type": "text", "text": "c"}


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """`dgemma eval` in this process: exit code, output, errors."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dgemma", "eval", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, error = capsys.readouterr()
        return int(ended.value.code or 0), out, error

    return run


@pytest.fixture
def random_model(monkeypatch: pytest.MonkeyPatch, random_lm: LanguageModel) -> None:
    """Whatever model is loaded, it is the random one."""
    monkeypatch.setattr(language_model, "load", lambda *_: random_lm)


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch, random_model: None) -> None:
    """In place of arithmetic, a task that any answer meets at level "a" and none at "b"."""

    def draw(rng: random.Random, level: str) -> Item:
        asked = {"role": "user", "content": str(rng.random())}
        return Item((asked, {"role": "assistant", "content": "ä"}), level)

    def check(item: Item, answer: Answer) -> Score:
        return Score(item.level == "a", True, {"length": float(len(answer.text))})

    task = SimpleNamespace(LEVELS=("a", "b"), draw=draw, check=check)
    monkeypatch.setattr(tasks, "get", lambda name: task)


@pytest.mark.skipif("sudoku" not in embedded.names(), reason="the embedded Sudoku model is not there")
def test_the_command_measures_the_embedded_model(few_bases: Path, tmp_path: Path) -> None:
    cases, png = tmp_path / "cases.jsonl", tmp_path / "figures.png"
    command = [
        "eval",
        "sudoku",
        "sudoku",
        "--count",
        "3",
        "--level",
        "45-56",
        "--level",
        "25-29",
        "--steps",
        "4",
        "--json",
        "--cases",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "dgemma", *command, cases, "--png", png],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(few_bases)},
    )
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert told["options"] == {"max_denoising_steps": 4}
    assert [(row["level"], row["count"]) for row in told["rows"]] == [("45-56", 3), ("25-29", 3), ("all", 6)]
    assert told["rows"][0]["parts"]["clues kept"] > 0.9
    assert png.read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(line) for line in cases.read_text("utf-8").splitlines()]
    assert [line["seed"] for line in lines] == list(range(6))
    assert sum(line["exact"] for line in lines) == round(6 * told["rows"][-1]["exact"]["share"])
    assert all(line["exact"] == (line["answer"] == line["reference"]["content"]) for line in lines)
    assert max(line["steps"] for line in lines) <= 4


@pytest.mark.usefixtures("echo")
def test_figures_come_as_a_table_or_as_markdown(call: Call) -> None:
    code, out, error = call("arithmetic", "sudoku", "--count", 2, "--judge", "sudoku")
    assert (code, error) == (0, "")
    assert "arithmetic, sudoku" in out
    assert "(34.2-100.0)" in out
    assert "judge sudoku: perplexity" in out
    code, out, _ = call("arithmetic", "sudoku", "--count", 2, "--level", "b", "--markdown")
    assert code == 0
    assert out.splitlines()[2].startswith("| b | 2 | 0.0 % (0.0-65.8) | 100.0 % (34.2-100.0) |")


@pytest.mark.usefixtures("random_model")
def test_a_file_of_conversations_is_a_task(call: Call, random_lm: LanguageModel, tmp_path: Path) -> None:
    said = random_lm.generate("b", seed=1).text
    lines = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "no noise says this"}]},
        {"prompt": "b", "response": f" {said}\n"},
        {"prompt": "c", "response": "nor this"},
    ]
    file = tmp_path / "talks.jsonl"
    file.write_text("\n\n".join(map(json.dumps, lines)))
    code, out, error = call(file, "sudoku", "--json")
    assert (code, error) == (0, "")
    (row, _) = json.loads(out)["rows"]
    assert (row["level"], row["count"], row["exact"]["share"]) == ("file", 3, pytest.approx(1 / 3))
    assert json.loads(call(file, "sudoku", "--json", "--count", 2)[1])["rows"][0]["exact"]["share"] == 0.5


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "b"}, "line 2: "),
        ({"messages": ["b", "c"]}, "line 2: messages[0]"),
        ({"messages": [{"role": "user", "content": "b"}]}, "line 2: a question and, as the last message, "),
        (
            {"messages": [{"role": "user", "content": "b"}, {"role": "assistant", "content": [PART]}]},
            "line 2: the last message must be text",
        ),
    ],
)
def test_a_line_that_is_no_conversation_is_named(call: Call, tmp_path: Path, line: object, message: str) -> None:
    file = tmp_path / "talks.jsonl"
    file.write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n" + json.dumps(line))
    code, out, error = call(file, "sudoku")
    assert (code, out) == (1, "")
    assert f"{file}, {message}" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("x.jsonl", "sudoku", "--level", "45-56"), "x.jsonl has no level '45-56'; known are file"),
        (("chess", "sudoku"), "there is no task 'chess'; known are arithmetic"),
        (("sudoku", "sudoku", "--level", "1-2"), "sudoku has no level '1-2'; known are 45-56"),
        (("sudoku", "sudoku", "--json", "--markdown"), "--json and --markdown exclude each other"),
        (("sudoku", "sudoku", "--cases", "no/such/file"), "there is no folder no/such to write file to"),
        (("sudoku", "sudoku", "--steps", "0"), "max_denoising_steps"),
        (("sudoku", "sudoku", "--count", "0"), "--count"),
    ],
)
def test_a_wrong_call_is_refused_in_a_line(call: Call, arguments: tuple[str, ...], message: str) -> None:
    code, out, error = call(*arguments)
    assert (code, out) == (2, "")
    assert message in error
    assert error.count("\n") == 1


def test_help_needs_neither_torch_nor_matplotlib() -> None:
    code = (
        "import sys; from dgemma import cli; sys.argv = ['dgemma', 'eval', '--help']\n"
        "try: cli.main()\nexcept SystemExit: print({'torch', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "--judge" in done.stdout
    assert done.stdout.endswith("set()\n")
