"""`dgemma bench vision`: what it measures is there, and both sides see the same."""

import json

import pytest
from typer.testing import CliRunner

from dgemma.bench import vision
from dgemma.bench.cli import app, show_vision
from dgemma.checkpoints import release
from dgemma.config import ModelConfig


def test_both_sides_see_the_same(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(vision, "SIZES", ((40, 60), (300, 100)))
    result = vision.run(layers=1, budget=70, repeats=2, threads=1)
    assert result.distance is not None
    assert result.distance < 1e-4
    assert set(result.sides) == {"dgemma", "transformers"}
    for what in ("prepare", "tower", "twice"):
        for side in (*(getattr(each, what) for each in result.sides.values()), result.ratios[what]):
            assert 0 < side.least <= side.median <= side.most
    assert json.loads(json.dumps(result.to_dict()))["budget"] == 70
    show_vision(result)
    assert "largest difference of soft tokens" in capsys.readouterr().out


def test_wrong_calls() -> None:
    for flags in (["--budget", "71"], ["--dtype", "f8"], ["--layers", "0"]):
        assert CliRunner().invoke(app, ["vision", *flags]).exit_code == 2


def test_the_tower_is_the_releases(shared) -> None:
    assert ModelConfig.from_file(shared / "config.json").vision == release.VISION
