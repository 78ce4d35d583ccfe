"""Where a run's examples come from: each batch is a function of (seed, step), so that a resumed run sees the same."""

import itertools
import random
import signal
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from dgemma.evals import tasks
from dgemma.language_model import LanguageModel
from dgemma.train.data import BadLine, Conversation, Example, canvases, examples, load_jsonl
from dgemma.train.objective import Batch


class Source(Protocol):
    """Hands out examples by number; the same number always means the same example."""

    def __call__(self, number: int) -> Example: ...


@dataclass(frozen=True)
class FileSource:
    """The examples of a file, epoch after epoch, each in an order of its own."""

    stored: list[Example]
    seed: int

    def __call__(self, number: int) -> Example:
        epoch, place = divmod(number, len(self.stored))
        return self.stored[_order(self.seed, epoch, len(self.stored))[place]]


@lru_cache(maxsize=2)  # a batch may lie across the border of two epochs
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


@dataclass(frozen=True)
class TaskSource:
    """Items of a task without end, none of them held out."""

    task: tasks.Task
    levels: tuple[str, ...]
    seed: int
    encode: Callable[[Conversation], list[Example]]

    def __call__(self, number: int) -> Example:
        rng = random.Random(f"{self.seed}/{number}")
        while True:
            item = self.task.draw(rng, rng.choice(self.levels))
            if not item.held_out:
                # The last example is the one that ends with the item's answer.
                return self.encode(Conversation(item.messages, item.tools, item.think))[-1]


@dataclass(frozen=True)
class Mixture:
    """Several sources by weight. A batch takes the next examples of each."""

    sources: list[Source]
    weights: list[float]
    seed: int

    def batch(self, step: int, size: int) -> list[Example]:
        """The examples of a step, counted from 0."""
        chosen = random.Random(f"{self.seed}/mix/{step}").choices(range(len(self.sources)), self.weights, k=size)
        return [self.sources[source](step * size + place) for place, source in enumerate(chosen)]


@contextmanager
def batches(mixture: Mixture, first: int, size: int, workers: int = 0) -> Iterator[Iterator[list[Example]]]:
    """The batches of steps `first`, `first` + 1 …, made ahead by so many processes; by this one if there are none."""
    if not workers:
        yield (mixture.batch(step, size) for step in itertools.count(first))
        return
    # Forked, since templates cannot be sent to another process; nothing in there touches a device.
    with ProcessPoolExecutor(workers, get_context("fork"), _inherit, (mixture,)) as pool:

        def ahead() -> Iterator[list[Example]]:
            steps = itertools.count(first)
            coming = deque(pool.submit(_batch, next(steps), size) for _ in range(2 * workers))
            while True:
                coming.append(pool.submit(_batch, next(steps), size))
                yield coming.popleft().result()

        try:
            yield ahead()
        finally:
            pool.shutdown(cancel_futures=True)


def _inherit(mixture: Mixture) -> None:
    global _mixture
    _mixture = mixture
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the trainer's to handle, who ends its workers


def _batch(step: int, size: int) -> list[Example]:
    return _mixture.batch(step, size)


_mixture: Mixture


def open_sources(
    weights: Mapping[str, float], lm: LanguageModel, limit: int, seed: int, bad: Callable[[str, BadLine], None]
) -> Mixture:
    """The sources of a recipe: tasks, "NAME:LEVEL", or JSONL files, whose bad lines are handed to `bad`."""
    canvas = lm.model.config.canvas_length

    def encode(conversation: Conversation) -> list[Example]:
        return examples(conversation, lm.tokenizer, lm.template, limit, canvas, lm.model.config)

    if not weights:
        raise ValueError("there is nothing to learn from: name a task or a JSONL file")
    sources: list[Source] = []
    for name, weight in weights.items():
        if not (isinstance(weight, int | float) and weight > 0):
            raise ValueError(f"the weight of {name} must be a number above 0, not {weight!r}")
        if name.endswith(".jsonl"):
            stored, refused = load_jsonl(Path(name), lm.tokenizer, lm.template, limit, canvas, lm.model.config)
            for line in refused:
                bad(name, line)
            sources.append(FileSource(stored, seed))
        else:
            task, levels = levels_of(name)
            tasks.prepare(task)
            sources.append(TaskSource(task, levels, seed, encode))
    return Mixture(sources, list(weights.values()), seed)


def levels_of(name: str) -> tuple[tasks.Task, tuple[str, ...]]:
    """The task and levels of "NAME" or "NAME:LEVEL"."""
    name, _, level = name.partition(":")
    task = tasks.get(name)
    if level and level not in task.LEVELS:
        raise ValueError(f"task {name} has no level {level!r}; it has {', '.join(task.LEVELS)}")
    return task, (level,) if level else task.LEVELS


def assemble(found: list[Example], count: int, canvas: int, fill: int, rng: random.Random) -> Batch:
    """A batch of `count` canvases of each example, drawn at random among all of its turns' canvases."""
    owner, start, clean = [], [], []
    for i, example in enumerate(found):
        pieces = [piece for target in example.targets for piece in canvases(target, example.tokens, canvas, fill)]
        for begin, tokens in sorted(rng.choices(pieces, k=count), key=lambda piece: piece[0]):
            owner.append(i)
            start.append(begin)
            clean.append(tokens)
    answers = [(i, target.start, target.stop) for i, example in enumerate(found) for target in example.targets]
    return Batch(
        [torch.tensor(example.tokens, dtype=torch.int64) for example in found],
        owner,
        start,
        torch.tensor(clean),
        answers,
        [example.pictures for example in found],
    )
