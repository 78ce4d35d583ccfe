"""Makes docs/loop.ipynb of docs/loop.py, a script in percent cells, and runs it: `python docs/notebook.py`."""

import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

HERE = Path(__file__).parent
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}


def notebook(script: str) -> nbformat.NotebookNode:
    """The cells of a script, in order: `# %%` begins code, `# %% [markdown]` comments that are text."""
    cells = []
    for i, part in enumerate(re.split(r"^# %%", script, flags=re.MULTILINE)[1:]):
        head, _, body = part.partition("\n")
        body = body.strip("\n")
        if "[markdown]" in head:
            made = new_markdown_cell("\n".join(line.removeprefix("#").removeprefix(" ") for line in body.splitlines()))
        else:
            made = new_code_cell(body)
        made.id = f"cell-{i}"  # a random one would differ each time
        cells.append(made)
    return new_notebook(cells=cells, metadata={"kernelspec": KERNEL})


def executed(made: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Runs all cells; CellExecutionError for the first that fails."""
    NotebookClient(made, timeout=120, kernel_name="python3", resources={"metadata": {"path": HERE}}).execute()
    for cell in made.cells:
        cell.metadata.pop("execution", None)  # the time of day
    return made


def main() -> None:
    made = executed(notebook((HERE / "loop.py").read_text(encoding="utf-8")))
    nbformat.write(made, HERE / "loop.ipynb")


if __name__ == "__main__":
    main()
