"""`dgemma bench vision`: what it measures is there, and both sides see the same."""

import json

import pytest
from typer.testing import CliRunner

from dgemma.bench import vision
from dgemma.bench.cli import app
from dgemma.checkpoints import release
from dgemma.config import ModelConfig


def test_both_sides_see_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(vision, "SIZES", ((40, 60), (300, 100)))
    arguments = ["vision", "--layers", "1", "--budget", "70", "--repeats", "2", "--threads", "1"]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["distance"] < 1e-4
    for what in ("prepare", "tower", "twice"):
        assert set(result["sides"]) == {"dgemma", "transformers"}
        for side in (*(result["sides"][name][what] for name in result["sides"]), result["ratios"][what]):
            assert 0 < side["least"] <= side["median"] <= side["most"]
    told = CliRunner().invoke(app, arguments)
    assert "largest difference of soft tokens" in told.stdout


def test_wrong_calls() -> None:
    for flags in (["--budget", "71"], ["--dtype", "f8"], ["--layers", "0"]):
        assert CliRunner().invoke(app, ["vision", *flags]).exit_code == 2


def test_the_tower_is_the_releases(shared) -> None:
    assert ModelConfig.from_file(shared / "config.json").vision == release.VISION
