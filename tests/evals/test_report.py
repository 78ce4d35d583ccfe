"""The same figures in a terminal, in Markdown, as JSON and as a picture."""

import builtins
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dgemma.evals import report
from dgemma.evals.measure import Row, Share

PARTS = {"cells": 0.97, "clues kept": 1.0}


@pytest.fixture
def rows() -> list[Row]:
    return [
        Row(
            "easy",
            200,
            Share(0.9, 0.85, 0.934),
            Share(1.0, 0.98, 1.0),
            PARTS,
            3.25,
            24.0,
            1.0,
        ),
        Row("hard", 200, Share(0.0, 0.0, 0.02), Share(0.5, 0.43, 0.57), {}, 40.0, 2.0, 0.25),
        Row(
            "all",
            400,
            Share(0.45, 0.4, 0.5),
            Share(0.75, 0.7, 0.79),
            PARTS,
            21.6,
            4.0,
            0.625,
        ),
    ]


def test_markdown_holds_every_figure(rows: list[Row]) -> None:
    assert report.markdown(rows).splitlines() == [
        "| level | items | exact | valid | cells | clues kept | steps | tokens a step | converged |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| easy | 200 | 90.0 % (85.0-93.4) | 100.0 % (98.0-100.0) | 97.0 % | 100.0 % | 3.2 | 24.0 | 100.0 % |",
        "| hard | 200 | 0.0 % (0.0-2.0) | 50.0 % (43.0-57.0) | - | - | 40.0 | 2.0 | 25.0 % |",
        "| all | 400 | 45.0 % (40.0-50.0) | 75.0 % (70.0-79.0) | 97.0 % | 100.0 % | 21.6 | 4.0 | 62.5 % |",
    ]


def test_the_table_shows_every_figure_in_80_columns(rows: list[Row]) -> None:
    out = io.StringIO()
    Console(file=out, width=80).print(report.table(rows, "sudoku, a model"))
    shown = out.getvalue()
    assert max(map(len, shown.splitlines())) <= 80
    assert "sudoku, a model" in shown
    assert "converged" in shown
    for line in report.cells(rows)[1:]:
        assert all(piece in shown for cell in line for piece in cell.replace(" (", "\n(").splitlines())


def test_json_gives_the_rows_back(rows: list[Row]) -> None:
    stored = json.loads(json.dumps(report.to_dict(rows)))
    assert [Row(**{**r, "exact": Share(**r["exact"]), "valid": Share(**r["valid"])}) for r in stored] == rows


def test_a_picture_is_a_png_with_a_bar_for_each_level(
    rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plt = pytest.importorskip("matplotlib.pyplot")
    drawn: list[Any] = []
    monkeypatch.setattr(plt, "close", drawn.append)
    report.picture(rows, "sudoku, a model", tmp_path / "figures")
    assert (tmp_path / "figures").read_bytes().startswith(b"\x89PNG")
    shares, steps = drawn[0].axes
    assert [bar.get_height() for bar in shares.patches] == pytest.approx([90, 0, 100, 50])
    assert [bar.get_height() for bar in steps.patches] == pytest.approx([3.25, 40])
    ends = [sorted(y for _, y in line) for lines in shares.collections for line in lines.get_segments()]
    assert ends == [pytest.approx(e) for e in ([85, 93.4], [0, 2], [98, 100], [43, 57])]
    monkeypatch.undo()
    plt.close(drawn[0])


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"needs matplotlib: pip install 'dgemma\[train\]'"):
        report.pyplot()
