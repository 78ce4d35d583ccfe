"""The drawing of a log: right figures, right panels, readable errors."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dgemma.train.curves import DPI, LEVEL_COLOURS, NAME_COLOURS, PANEL, Series, draw, read_log, running_mean

WIDTH, HEIGHT = round(PANEL[0] * DPI), round(PANEL[1] * DPI)


def _write(directory: Path, *entries: dict[str, Any], torn: str = "") -> None:
    (directory / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries) + torn)


def _loss(step: int) -> dict[str, float]:
    return {"step": step, "loss": 2.5 / step, **{f"level/{i}": (i + 1) / step for i in range(4)}}


def _share(image: np.ndarray, colour: str) -> float:
    """The share of the pixels that have a colour."""
    wanted = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return float((np.abs(image[..., :3] - wanted).max(-1) < 0.02).mean())


def _panels(directory: Path, count: int) -> list[np.ndarray]:
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    image = imread(draw(directory))
    assert image.shape[:2] == (HEIGHT, WIDTH * count)
    return np.split(image, count, axis=1)


def test_a_log_is_read_by_name(tmp_path: Path):
    _write(
        tmp_path,
        {"step": 10, "seconds": 1.5, "loss": 2.0, "level/0": 1.0},
        {"step": 10, "eval": {"exact/a b": 0.5, "valid/loss": 3.0}},
        {"step": 20, "seconds": 2.5, "loss": None},
        torn='{"step": 30, "loss": 1.',
    )
    series = read_log(tmp_path / "log.jsonl")
    assert set(series) == {"seconds", "loss", "level/0", "eval/exact/a b", "eval/valid/loss"}
    assert series["seconds"] == Series([10, 20], [1.5, 2.5])
    assert series["level/0"] == Series([10], [1.0])
    assert series["eval/exact/a b"] == Series([10], [0.5])
    assert series["loss"].steps == [10, 20]
    assert math.isnan(series["loss"].values[1])


@pytest.mark.parametrize("window", [1, 3, 7])
def test_a_running_mean_is_the_mean_of_the_finite_neighbours(window: int):
    values = np.random.default_rng(0).random(20)
    values[[4, 5, 6, 19]] = np.nan, np.inf, np.nan, np.nan
    reach = window // 2
    for i, mean in enumerate(running_mean(values, window)):
        near = [v for v in values[max(0, i - reach) : i + reach + 1] if math.isfinite(v)]
        assert mean == pytest.approx(np.mean(near) if near else np.nan, nan_ok=True)


def test_three_panels_each_with_its_curves(tmp_path: Path):
    entries = [_loss(step) | {"causal": 3 / step} for step in range(1, 40)]
    _write(tmp_path, *entries, *({"step": s, "eval": {"exact/a": s / 40, "exact/b": 0.5}} for s in (10, 20, 30)))
    levels, causal, exact = _panels(tmp_path, 3)
    assert all(_share(levels, colour) > 1e-3 for colour in LEVEL_COLOURS)
    assert _share(causal, NAME_COLOURS[0]) > 1e-3
    assert all(_share(exact, colour) > 1e-3 for colour in NAME_COLOURS[:2])
    assert _share(exact, NAME_COLOURS[2]) == 0


def test_panels_without_figures_are_left_out(tmp_path: Path):
    _write(tmp_path, *map(_loss, range(1, 40)), {"step": 20, "eval": {"valid/loss": 1.0}})
    (levels,) = _panels(tmp_path, 1)
    assert all(_share(levels, colour) > 1e-3 for colour in LEVEL_COLOURS)


def test_one_line_is_enough(tmp_path: Path):
    _write(tmp_path, {"step": 10, "loss": 2.0})
    _panels(tmp_path, 1)


def test_a_log_without_curves_is_an_error_that_names_it(tmp_path: Path):
    pytest.importorskip("matplotlib")
    _write(tmp_path, {"step": 20, "eval": {"valid/loss": 1.0}}, torn='{"st')
    with pytest.raises(ValueError, match=r"log\.jsonl has no loss"):
        draw(tmp_path)
    assert not (tmp_path / "curves.png").exists()


def test_matplotlib_that_is_not_installed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"pip install 'dgemma\[train\]'"):
        draw(tmp_path)


def test_the_command_draws_and_tells_the_file_or_the_error(tmp_path: Path):
    pytest.importorskip("matplotlib")
    command = [sys.executable, "-m", "dgemma.train.curves", str(tmp_path)]
    missing = subprocess.run(command, capture_output=True, text=True)
    assert missing.returncode == 1
    assert missing.stderr.startswith("error: ")
    assert "log.jsonl" in missing.stderr
    assert "Traceback" not in missing.stderr
    _write(tmp_path, _loss(1), _loss(2))
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == str(
        tmp_path / "curves.png"
    )
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
