"""`dgemma bench constrain`: what it measures is there and adds up."""

import json

from typer.testing import CliRunner

from dgemma.bench.cli import app


def test_what_is_measured() -> None:
    arguments = ["constrain", "--shape", "train", "--dtype", "f32", "--repeats", "3", "--threads", "1"]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["states"] > 50
    assert result["warm"] < result["cold"]
    assert result["warm"] < 0.05
    for side in ("free", "bound", "ratio"):
        assert 0 < result[side]["least"] <= result[side]["median"] <= result[side]["most"]
    told = CliRunner().invoke(app, arguments)
    assert "bound over free" in told.stdout


def test_a_wrong_call() -> None:
    assert CliRunner().invoke(app, ["constrain", "--shape", "huge"]).exit_code == 2
