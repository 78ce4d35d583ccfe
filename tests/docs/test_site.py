"""The documentation site: it builds without a broken link, and what it says of commands and options is so."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from dgemma.cli import app

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted((ROOT / "docs" / "site").glob("*.md")), ROOT / "README.md", ROOT / "docs" / "conformance.md"]
sys.path.insert(0, str(ROOT / "docs"))


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    zensical = Path(sys.executable).with_name("zensical")
    if not zensical.exists():
        pytest.skip("zensical is not installed: pip install 'dgemma[docs]'")
    (folder / "docs").mkdir(exist_ok=True)
    shutil.copy(ROOT / "zensical.toml", folder)
    shutil.copytree(ROOT / "docs" / "site", folder / "docs" / "site", dirs_exist_ok=True)
    return subprocess.run([zensical, "build", "--strict"], cwd=folder, capture_output=True, text=True, timeout=60)


def test_the_site_builds_without_a_broken_link(tmp_path):
    found = build(tmp_path)
    assert found.returncode == 0, found.stdout + found.stderr
    page = (tmp_path / "build" / "site" / "how" / "index.html").read_text(encoding="utf-8")
    for picture in re.findall(r'<img[^>]*src="([^"]+)"', page):
        assert (tmp_path / "build" / "site" / "how" / picture).resolve().is_file()
    assert page.count("<img") == 2


@pytest.mark.parametrize(("link", "what"), [("[gone](gone.md)", "page"), ("[gone](recipes.md#gone)", "anchor")])
def test_a_broken_link_would_be_found(link, what, tmp_path):
    site = tmp_path / "docs" / "site"
    site.mkdir(parents=True)
    assert build(tmp_path).returncode == 0
    (site / "extra.md").write_text(f"# Extra\n\n{link}\n", encoding="utf-8")
    found = build(tmp_path)
    assert found.returncode != 0
    assert f"{what} does not exist" in found.stderr


def test_the_reference_is_what_the_code_says():
    pages = pytest.importorskip("pages")
    kept = (ROOT / "docs" / "site" / "reference.md").read_text(encoding="utf-8")
    assert kept == pages.reference(), "python docs/pages.py"


def typed(path: Path) -> list[str]:
    """The lines of a page's code blocks that call dgemma."""
    blocks = re.findall(r"^```sh\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith("dgemma ")]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_commands_that_are_told_exist_with_their_options(path):
    root = typer.main.get_command(app)
    for line in typed(path):
        _, *words = shlex.split(line, comments=True)
        command = root
        while hasattr(command, "commands"):
            assert words, line
            name = words.pop(0)
            assert name in command.commands, f"{path.name}: {line}"
            command = command.commands[name]
        known = {name for parameter in command.params for name in parameter.opts}
        for word in words:
            if word.startswith("-") and len(word) > 1:
                assert word.split("=")[0] in known, f"{path.name}: {word} in {line}"


def test_there_are_commands_to_check():
    assert sum(len(typed(path)) for path in PAGES) > 40
