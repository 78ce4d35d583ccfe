"""Small trained models that ship in the package: directories in the released format, each with its card.

A model made for one task brings the task along: what a prompt must look like, and how an answer is checked.
"""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Protocol

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Verdict:
    """What a check found: whether the answer is right, and why, in words."""

    right: bool
    reason: str


class Task(Protocol):
    """The module of an embedded model."""

    def prepare(self, text: str) -> str:
        """The prompt as the model was trained to read it. ValueError says what is wrong with the text."""

    def check(self, prompt: str, answer: str) -> Verdict:
        """Holds an answer against the task's rules, without the model."""


def names() -> list[str]:
    """Embedded models that are there, by name."""
    return sorted(path.parent.name for path in HERE.glob("*/model.safetensors"))


def directory(name: str) -> Path | None:
    """Where an embedded model lies, or None for a name that is not one."""
    return HERE / name if name in names() else None


def task(path: Path) -> Task | None:
    """The task of the model in a directory; None for one that does not ship here, or answers any question."""
    own = path.parent == HERE and (path / "__init__.py").exists()
    return import_module(f"{__name__}.{path.name}") if own else None
