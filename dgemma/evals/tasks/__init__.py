"""Tasks whose answers can be checked: where training examples come from, and what a model is measured on."""

import hashlib
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Protocol

Message = Mapping[str, Any]

NAMES = (
    "arithmetic",
    "sorting",
    "extraction",
    "tools",
    "tables",
    "markdown",
    "python",
    "prose",
    "sudoku",
    "digits",
    "sudoku_picture",
)
HELD_OUT = 16
"""One question in so many is kept for measuring; which ones is decided by the question itself."""


@dataclass(frozen=True)
class Item:
    """A conversation whose last message is the model's right answer.

    messages: as for `LanguageModel.generate`, assistant messages with "content", "reasoning" and "tool_calls"; tools,
    think: what the chat template gets; level: how hard it is, one of the task's levels; facts: what only the check
    needs; key: what questions share that count as one when some are held out, the question itself if empty.
    """

    messages: tuple[Message, ...]
    level: str
    tools: tuple[Mapping[str, Any], ...] = ()
    think: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)
    key: str = ""

    @property
    def question(self) -> tuple[Message, ...]:
        return self.messages[:-1]

    @property
    def answer(self) -> Message:
        return self.messages[-1]

    @property
    def held_out(self) -> bool:
        """Whether this question is for measuring and never for training."""
        asked = self.key or json.dumps([list(self.question), list(self.tools)], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(asked.encode()).digest()[0] % HELD_OUT == 0


class Answer(Protocol):
    """What a model said: a `dgemma.Generation`."""

    @property
    def text(self) -> str: ...
    @property
    def reasoning(self) -> str: ...
    @property
    def tool_calls(self) -> list[Any]: ...


@dataclass(frozen=True)
class Score:
    """exact: the right answer, whole; valid: keeps the task's form and rules, right or not; parts: further shares."""

    exact: bool
    valid: bool
    parts: Mapping[str, float] = field(default_factory=dict)


class Task(Protocol):
    """A module of this package."""

    @property
    def LEVELS(self) -> tuple[str, ...]:  # noqa: N802
        """Names of the levels, easiest first."""

    def draw(self, rng: random.Random, level: str) -> Item:
        """One item of a level; all randomness from `rng`."""

    def check(self, item: Item, answer: Answer) -> Score:
        """Holds a model's answer against the item, by rule where several answers are right."""


def get(name: str) -> Task:
    """The task of a name; ValueError lists the known ones."""
    if name not in NAMES:
        raise ValueError(f"there is no task {name!r}; known are {', '.join(NAMES)}")
    return import_module(f"{__name__}.{name}")


def prepare(task: Task) -> None:
    """Makes a task ready to train on: some have more to draw from than measuring waits for."""
    if hasattr(task, "pool"):
        task.pool()


def constraint(task: Any, item: Item) -> Any:
    """What a correct answer's form must be, as far as the question tells: a constraint for `generate`, or None."""
    return task.constraint(item) if hasattr(task, "constraint") else None


def items(task: Task, count: int, seed: int, held_out: bool, level: str | None = None) -> list[Item]:
    """`count` items, of one level or of all in turn, either all held out or none of them."""
    rng = random.Random(seed)
    found: list[Item] = []
    while len(found) < count:
        item = task.draw(rng, level or task.LEVELS[len(found) % len(task.LEVELS)])
        if item.held_out == held_out:
            found.append(item)
    return found
