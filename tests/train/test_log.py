"""What a run tells: the file, TensorBoard's events, the bar and the plain lines."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyte
import pytest

from dgemma.train.log import RunLog, read_entries


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _step(loss: float, **more: float) -> dict[str, float]:
    return {"loss": loss, "rate": 1.0, "norm": 0.5, "examples": 8, **more}


def _run(directory: Path, first: int, last: int, loss: float, every: int = 2, **options: Any) -> None:
    with RunLog(directory, 100, start=first - 1, every=every, out=io.StringIO(), **options) as log:
        for step in range(first, last + 1):
            log.record(step, _step(loss))


def test_a_line_has_the_means_of_its_steps(tmp_path: Path):
    clock = Clock()
    with RunLog(tmp_path / "new" / "run", 4, out=io.StringIO(), every=2, clock=clock) as log:
        for step, values in enumerate([_step(4, causal=1), _step(2), _step(1, **{"level/0": 3}), _step(2)], 1):
            clock.now += 2
            log.record(step, values)
    first, second = read_entries(log.file)
    common = {"rate": 1.0, "norm": 0.5, "examples": 8.0, "examples_per_second": 4.0}
    assert first == {"step": 2, "seconds": 4.0, "loss": 3.0, "causal": 1.0, **common}
    assert second == {"step": 4, "seconds": 8.0, "loss": 1.5, "level/0": 3.0, **common}


def test_the_last_steps_are_written_though_no_line_is_full_and_the_run_fails(tmp_path: Path):
    log = RunLog(tmp_path, 100, out=io.StringIO())

    def fail() -> None:
        with log:
            for step in (1, 2, 3):
                log.record(step, _step(step))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [(entry["step"], entry["loss"]) for entry in read_entries(log.file)] == [(3, 2.0)]


def test_an_evaluation_is_written_at_once_and_its_time_is_not_the_steps_time(tmp_path: Path):
    clock = Clock()
    with RunLog(tmp_path, 2, out=io.StringIO(), every=2, clock=clock) as log:
        clock.now += 1
        log.record(1, _step(1))
        clock.now += 1000
        log.evaluated(1, {"exact/sudoku 45-56": 0.5})
        assert read_entries(log.file) == [{"step": 1, "eval": {"exact/sudoku 45-56": 0.5}}]
        clock.now += 1
        log.record(2, _step(1))
    assert read_entries(log.file)[1]["examples_per_second"] == 8.0


def test_what_is_not_finite_is_null_in_strict_json(tmp_path: Path):
    with RunLog(tmp_path, 1, out=io.StringIO()) as log:
        log.record(1, _step(float("nan"), causal=float("inf")))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    entry = json.loads(log.file.read_text(), parse_constant=refuse)
    assert entry["loss"] is None
    assert entry["causal"] is None


@pytest.mark.parametrize("torn", ["", '{"step": 6, "se', "\0\0\0"])
def test_a_resumed_run_holds_no_step_twice(tmp_path: Path, torn: str):
    _run(tmp_path, 1, 6, loss=1.0, every=1)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write(torn)
    _run(tmp_path, 5, 9, loss=2.0)
    figures = [(entry["step"], entry["loss"]) for entry in read_entries(tmp_path / "log.jsonl")]
    assert figures == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (6, 2.0), (8, 2.0), (9, 2.0)]
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_a_run_without_a_checkpoint_begins_anew_whatever_lies_there(tmp_path: Path):
    (tmp_path / "log.jsonl").write_text('broken\n{"step": 0, "eval": {}}\n')
    _run(tmp_path, 1, 2, loss=1.0)
    assert [entry["step"] for entry in read_entries(tmp_path / "log.jsonl")] == [2]


def test_a_broken_line_that_is_not_the_last_is_named(tmp_path: Path):
    file = tmp_path / "log.jsonl"
    file.write_text('{"step": 1}\n{"step": 2\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"log\.jsonl, line 2 is not JSON"):
        RunLog(tmp_path, 10, start=3)
    assert file.read_text().count("\n") == 3


def test_steps_go_forward(tmp_path: Path):
    with RunLog(tmp_path, 10, start=3, out=io.StringIO()) as log:
        log.record(4, _step(1))
        with pytest.raises(ValueError, match=r"step 4 .* already done"):
            log.record(4, _step(1))


def test_every_must_be_positive(tmp_path: Path):
    with pytest.raises(ValueError, match="at least 1 step, not 0"):
        RunLog(tmp_path, 10, every=0)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_told_with_the_file_and_what_to_do(tmp_path: Path):
    with RunLog(tmp_path, 10, out=io.StringIO(), every=2) as log:
        log.file.symlink_to("/dev/full")
        log.record(1, _step(1))
        with pytest.raises(OSError, match=r"No space left on device; make room .*log\.jsonl"):
            log.record(2, _step(1))


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot be written: .*log\.jsonl"):
        RunLog(tmp_path / "file" / "run", 10)


def test_tensorboard_reads_the_figures_back_and_a_resumed_run_has_no_step_twice(tmp_path: Path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _run(tmp_path, 1, 6, loss=1.0, tensorboard=True)
    with RunLog(tmp_path, 100, start=4, tensorboard=True, every=2, out=io.StringIO()) as log:
        log.record(5, _step(2.0))
        log.record(6, _step(4.0))
        log.evaluated(6, {"exact/sudoku 45-56": 0.5})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    figures = lambda name: [(event.step, event.value) for event in events.Scalars(name)]  # noqa: E731
    assert figures("loss") == [(2, 1.0), (4, 1.0), (6, 3.0)]
    assert figures("eval/exact/sudoku 45-56") == [(6, 0.5)]
    assert "examples_per_second" in events.Tags()["scalars"]


def test_tensorboard_that_is_not_installed_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"pip install 'dgemma\[train\]'"):
        RunLog(tmp_path / "run", 10, tensorboard=True)
    assert not (tmp_path / "run").exists()


def test_a_pipe_gets_a_plain_line_every_30_seconds_and_one_at_the_end(tmp_path: Path):
    clock, out = Clock(), io.StringIO()
    with RunLog(tmp_path, 1000, start=900, out=out, clock=clock) as log:
        for step in range(901, 913):
            clock.now += 10
            log.record(step, _step(2, causal=1))
            if step == 904:
                log.note("saved [1/2]")
        clock.now += 10
        log.record(913, _step(2))
    lines = out.getvalue().splitlines()
    assert [line.split(" · ")[0] for line in lines] == [
        *("step 903/1000", "saved [1/2]", "step 906/1000", "step 909/1000", "step 912/1000", "step 913/1000")
    ]
    assert lines[0] == ("step 903/1000 · loss 2.000 · causal 1.000 · 0.80 examples/s · 0:00:30 elapsed · 0:16:10 left")
    assert "\x1b" not in out.getvalue()


def test_a_dumb_terminal_gets_plain_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "dumb")
    out = Terminal()
    with RunLog(tmp_path, 10, out=out) as log:
        log.record(1, _step(2))
    assert out.getvalue().startswith("step 1/10 · loss 2.000")


def test_a_terminal_shows_one_bar_below_the_notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    out = Terminal()
    with RunLog(tmp_path, 50000, start=20000, out=out) as log:
        for step in range(20001, 20041):
            log.record(step, _step(1.5, causal=0.25))
            if step % 20 == 0:
                log.note(f"saved :+1: [red]{step}")
    screen = pyte.Screen(80, 8)
    pyte.Stream(screen).feed(out.getvalue().replace("\n", "\r\n"))
    first, second, bar, *rest = (row.rstrip() for row in screen.display)
    assert (first, second) == ("saved :+1: [red]20020", "saved :+1: [red]20040")
    assert bar.startswith("20040/50000 ")
    assert "━" in bar
    assert "loss 1.500 · causal 0.250 · " in bar
    assert "examples/s 0:00:0" in bar
    assert not any(rest)


def test_a_bar_leaves_standard_output_alone_if_that_is_a_pipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("TERM", "xterm-256color")
    out = Terminal()
    with RunLog(tmp_path, 10, out=out):
        print("a result")
    assert capsys.readouterr().out == "a result\n"
    assert "0/10" in out.getvalue()


def test_importing_it_is_light():
    code = "import sys, dgemma.train.log; print({'torch', 'rich'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
