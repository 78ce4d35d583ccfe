"""`dgemma bench serve` end to end on the small shape. No figure is asserted that depends on the machine's speed."""

import json
import math
import subprocess
import sys
from typing import Any

import pytest
from typer.testing import CliRunner

from dgemma.bench import serve
from dgemma.bench.cli import app, show_serving
from dgemma.bench.harness import Spread


def check_level(level: dict[str, Any]) -> None:
    for spread in level.values():
        assert all(math.isfinite(value) for value in spread.values())
        assert 0 < spread["least"] <= spread["median"] <= spread["most"]
    assert level["first_block"]["median"] <= level["p50"]["most"]
    assert level["p50"]["median"] <= level["p99"]["median"]
    assert level["fairness"]["most"] <= 1 + 1e-9


def test_all_sides_do_the_same_work() -> None:
    pytest.importorskip("transformers", reason="transformers, the other side, is not installed")
    flags = ["--shape", "small", "--concurrency", "1,3", "--requests", "1", "--repeats", "1", "--threads", "1"]
    command = [sys.executable, "-c", "from dgemma.bench.cli import app; app()", "serve", *flags, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["model"], result["dtype"], result["canvas"]) == ("small", "float32", 32)
    assert list(result["served"]) == list(result["engine"]) == list(result["gain"]) == ["1", "3"]
    levels = [*result["served"].values(), *result["engine"].values(), result["transformers"]]
    for level in levels:
        check_level(level)
    assert all(spread["least"] > -1 for spread in result["overhead"].values())
    for side in ("served", "engine"):
        assert result[side]["1"]["fairness"]["least"] == 1
    one, rate = result["gain"]["1"], result["served"]["1"]["tokens_per_second"]
    assert one["most"] >= rate["least"] / result["transformers"]["tokens_per_second"]["most"]
    shared = result["shared_prefix"]
    assert shared["tokens"] == shared["cached"] == 4096, "whole pages of 32"
    assert shared["gain"]["least"] > 1
    assert {"torch", "transformers"} == set(result["versions"])


def test_jains_index_and_percentiles() -> None:
    assert serve.jain([2.0, 2.0, 2.0]) == pytest.approx(1)
    assert serve.jain([1.0, 0.0, 0.0, 0.0]) == pytest.approx(1 / 4)
    assert serve.jain([1.0, 3.0]) == pytest.approx(16 / 20)
    hundred = [float(n) for n in range(1, 101)]
    assert [serve.percentile(hundred, p) for p in (50, 99, 100)] == [50, 99, 100]
    assert serve.percentile([7.0], 99) == serve.percentile([7.0], 0) == 7


def test_figures_of_a_level() -> None:
    """Two clients: one answers in 1 s, twice; the other in 2 s, once."""
    samples = [serve.Sample(0, 0, 0.5, 1), serve.Sample(0, 1, 1.5, 2), serve.Sample(1, 0, 1.9, 2)]
    level = serve._level([samples], tokens=10)
    assert level.tokens_per_second.median == 15
    assert (level.first_block.median, level.p50.median, level.p99.median) == (0.5, 1, 2)
    assert level.fairness.median == pytest.approx(serve.jain([1, 0.5]))


def test_clients_ask_one_after_the_other_and_all_at_once() -> None:
    asked: list[int] = []
    samples = serve.ask_all(3, 2, 10, lambda number: asked.append(number) or 1.0)  # type: ignore[func-returns-value]
    assert sorted(asked) == [10, 11, 12, 13, 14, 15]
    assert [sample.client for sample in samples] == [0, 0, 1, 1, 2, 2]
    with pytest.raises(OSError, match="7 denoising steps instead of 8"):
        serve._check(7)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--shape", "huge"], "shape 'huge'"),
        (["--model", "sudoku", "--dtype", "f32"], "give them or model"),
        (["--requests", "0"], "requests must be at least 1, not 0"),
        (["--concurrency", "0,4"], "concurrency must be at least 1, not 0"),
        (["--concurrency", "few"], "such as 1,4"),
        (["--repeats", "0"], "repeats must be at least 1, not 0"),
    ],
)
def test_bad_values_are_named(flags: list[str], words: str) -> None:
    done = CliRunner().invoke(app, ["serve", *flags])
    assert done.exit_code == 2
    assert done.stdout == ""
    assert words in " ".join(done.stderr.replace("│", " ").split())


def test_the_table_names_what_it_shows(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    s = Spread(1.0, 0.5, 2.0)
    level = serve.Level(s, s, s, s, s)
    shared = serve.Shared(4096, 4096, s, Spread(0.25, 0.25, 0.25), s)
    told = {"model": "mid", "dtype": "float32", "device": "cpu", "threads": 2, "repeats": 3, "requests": 5}
    work = {"prompt": 1, "canvas": 2, "blocks": 2, "steps": 4, "machine": "a machine", "versions": {"torch": "2"}}
    figures = {"served": {4: level}, "engine": {4: level}, "transformers": None, "overhead": {4: Spread(0.125, 0, 1)}}
    rest = {"gain": None, "shared_prefix": shared, "peak_bytes": {}}
    show_serving(serve.Result(**told, **work, **figures, **rest))  # type: ignore[arg-type]
    shown = capsys.readouterr().out
    for word in ("mid, float32, cpu, 2 threads, 3 repeats", "12.5%", "4, no HTTP", "250 (250 … 250)", "a machine"):
        assert word in shown
