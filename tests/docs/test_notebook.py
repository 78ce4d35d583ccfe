"""docs/loop.ipynb is what docs/loop.py says, and runs from the first cell to the last."""

import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")
sys.path.insert(0, str(DOCS))

import notebook  # noqa: E402


def sources(made):
    return [(cell.cell_type, cell.source) for cell in made.cells]


def texts(made):
    """What each cell prints."""
    cells = [cell for cell in made.cells if cell.cell_type == "code"]
    return ["".join(o.text for o in cell.outputs if o.output_type == "stream" and o.name == "stdout") for cell in cells]


def test_the_notebook_is_what_the_script_says():
    kept = nbformat.read(DOCS / "loop.ipynb", 4)
    assert sources(kept) == sources(notebook.notebook((DOCS / "loop.py").read_text(encoding="utf-8")))


def test_it_runs_and_says_what_it_said(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(DOCS.parent))
    kept = nbformat.read(DOCS / "loop.ipynb", 4)
    run = notebook.executed(notebook.notebook((DOCS / "loop.py").read_text(encoding="utf-8")))
    # The last cell counts outcomes of many puzzles, where another machine's rounding may turn one.
    assert texts(run)[:-1] == texts(kept)[:-1]
    assert any(text.startswith("the same 90 tokens") for text in texts(run))
    pictures = [o for c in run.cells if c.cell_type == "code" for o in c.outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == 7


def test_a_cell_that_fails_is_an_error():
    from nbclient.exceptions import CellExecutionError

    with pytest.raises(CellExecutionError, match="KeyError"):
        notebook.executed(notebook.notebook("# %%\n{}['nothing']\n"))
