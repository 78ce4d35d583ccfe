"""`dgemma bench decode` end to end on the small shape. No figure is asserted that depends on the machine's speed."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from dgemma.bench import decode, harness
from dgemma.bench.cli import app


def bench(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from dgemma.bench.cli import app; app()", "decode", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def check_figures(result: dict, names: list[str]) -> None:
    assert list(result["sides"]) == names
    for side in result["sides"].values():
        for what in ("start", "first", "prefill", "step"):
            spread = side[what]
            assert all(math.isfinite(value) for value in spread.values())
            assert spread["least"] <= spread["median"] <= spread["most"]
        assert 0 < side["start"]["median"] < side["first"]["median"]
        assert side["prefill"]["least"] > 0
        assert list(side["tokens_per_second"]) == ["12", "16", "20"]
        if side["peak_bytes"] is not None:
            assert 50 << 20 < side["peak_bytes"] < 8 << 30
    assert list(result["ratios"]) == names[1:]
    assert result["machine"]


def test_both_sides_and_equal_trajectories():
    pytest.importorskip("transformers", reason="transformers, the other side, is not installed")
    done = bench("--shape", "small", "--dtype", "f32", "--repeats", "1", "--threads", "1", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    check_figures(result, ["dgemma", "transformers"])
    assert result["trajectories_equal"] is True
    assert {"torch", "transformers"} == set(result["versions"])
    assert (result["shape"], result["dtype"], result["threads"], result["repeats"]) == ("small", "f32", 1, 1)


def test_without_transformers_this_project_is_measured_alone(monkeypatch, capsys):
    monkeypatch.setattr(harness.util, "find_spec", lambda name: None)
    done = CliRunner().invoke(app, ["decode", "--shape", "small", "--repeats", "2", "--threads", "1", "--json"])
    assert done.exit_code == 0
    assert "transformers is not installed" in done.stderr
    result = json.loads(done.stdout)
    check_figures(result, ["dgemma"])
    assert result["trajectories_equal"] is None
    assert result["dtype"] == "bf16"


def test_other_draws_make_other_trajectories(tmp_path, monkeypatch):
    """The comparison that says `equal` can say otherwise: its two sides are looked at, not one twice."""
    from dgemma.bench.shapes import SHAPES
    from dgemma.bench.sides import Ours
    from dgemma.decoding.noise import Noise

    decode.write_weights(SHAPES["small"], "float32", tmp_path)
    side = Ours(str(tmp_path), "cpu", threads=torch.get_num_threads(), tokens=32)
    first = side.trajectory(steps=3)
    assert [len(step) for step in first] == [2, 2, 2]
    assert first == side.trajectory(steps=3)
    renoise = Noise.renoise
    monkeypatch.setattr(Noise, "renoise", lambda self, block, step: renoise(self, block, step + 1))
    assert first != side.trajectory(steps=3)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--shape", "huge"], ["shape 'huge'", "mid, small"]),
        (["--dtype", "int8"], ["dtype 'int8'", "bf16, f32"]),
        (["--repeats", "0"], ["repeats must be at least 1, not 0"]),
        (["--threads", "-1"], ["threads must be at least 1, not -1"]),
    ],
)
def test_bad_values_are_named(flags, words):
    done = CliRunner().invoke(app, ["decode", *flags])
    assert done.exit_code == 2
    assert done.stdout == ""
    assert all(word in done.stderr for word in words)


def test_the_table_names_what_it_shows(capsys):
    from dgemma.bench.cli import show
    from dgemma.bench.harness import Spread

    second = Spread(1.0, 0.5, 2.0)
    side = decode.Measured(second, second, second, second, 3 << 20, dict.fromkeys(decode.STEPS_A_CANVAS, 4.0))
    sides = {decode.OURS: side, decode.THEIRS: side}
    ratios = {decode.THEIRS: Spread(2.5, 2.25, 2.75)}
    show(decode.Result("mid", "f32", 2, 3, "a machine", {"torch": "2"}, sides, ratios, False))
    shown = capsys.readouterr().out
    for word in (
        "mid, f32, 2 threads, 3 repeats",
        "1000 (500 … 2000)",
        "2.50 (2.25 … 2.75)",
        "a machine; torch 2",
    ):
        assert word in shown
    assert "trajectories equal: no" in shown


@pytest.mark.parametrize("packed", [False, True])
def test_another_state_of_the_project_runs_as_it_was(tmp_path, monkeypatch, capsys, packed):
    """Its own code answers: here one that says how long a prefill takes without doing it."""
    monkeypatch.setattr(harness.util, "find_spec", lambda name: None)
    old = tmp_path / "old"
    shutil.copytree(Path(decode.__file__).parents[1], old / "dgemma", ignore=shutil.ignore_patterns("embedded"))
    sides = old / "dgemma" / "bench" / "sides.py"
    text = sides.read_text()
    assert "        self._encode()\n" in text
    sides.write_text(text.replace("        self._encode()\n", "        return 123.0\n", 1))
    if packed:
        old = Path(shutil.make_archive(str(tmp_path / "old"), "zip", old)).rename(tmp_path / "old.whl")
    flags = ["--shape", "small", "--repeats", "1", "--threads", "1", "--against", str(old), "--json"]
    done = CliRunner().invoke(app, ["decode", *flags])
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    check_figures(result, ["dgemma", f"dgemma of {old.name}"])
    assert result["sides"][f"dgemma of {old.name}"]["prefill"]["median"] == 123
    assert result["sides"]["dgemma"]["prefill"]["median"] < 100


def test_what_is_no_state_of_the_project_is_refused(tmp_path):
    done = CliRunner().invoke(app, ["decode", "--shape", "small", "--against", str(tmp_path)])
    assert done.exit_code == 2
    assert "is no wheel of dgemma" in done.stderr


def test_importing_the_commands_imports_no_torch():
    script = "import sys, dgemma.bench.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
