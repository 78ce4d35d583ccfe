"""`dgemma eval-formats` on the embedded Sudoku model."""

import json

import pytest
from typer.testing import CliRunner

from dgemma import cli


def run(*arguments: str):
    return CliRunner().invoke(cli.app, ["eval-formats", *arguments])


def test_cost_of_each_format() -> None:
    told = run("sudoku", "--task", "sudoku", "--count", "2", "--steps", "8", "--formats", "int8,int4", "--json")
    assert told.exit_code == 0, told.output
    plain, int8, int4 = json.loads(told.output)["formats"]
    assert [row["format"] for row in (plain, int8, int4)] == ["float32", "int8", "int4"]
    assert plain["divergence"] == plain["gained"] == plain["lost"] == 0
    assert 0 < int8["divergence"] < int4["divergence"] < 0.01
    assert 8 < int8["bits"] < 8.5
    assert 4.5 < int4["bits"] < 6.5  # the experts' 4.5, and 8 of the rest
    assert int4["bytes"] < int8["bytes"] < plain["bytes"]
    for row in (int8, int4):
        assert row["exact"]["share"] == pytest.approx(plain["exact"]["share"] + row["gained"] - row["lost"])


def test_table() -> None:
    told = run("sudoku", "--task", "sudoku", "--count", "1", "--steps", "2", "--formats", "w4a8")
    assert told.exit_code == 0, told.output
    header, _, plain, packed = told.output.strip().splitlines()[-4:]
    assert header.startswith("| format | bits a weight |")
    assert plain.startswith("| float32 | 32.00 |")
    assert packed.startswith("| w4a8 | 6.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("sudoku",), "--task is needed"), (("sudoku", "--task", "sudoku", "--formats", "int3"), "'int3' is not one of")],
)
def test_wrong_calls(arguments: tuple[str, ...], message: str) -> None:
    told = run(*arguments)
    assert told.exit_code != 0
    assert message in f"{told.output}{told.exception}"
