"""Where examples come from: the same for the same number, none held out, each once in an epoch."""

import itertools
from array import array

import pytest

from dgemma import embedded
from dgemma.evals import tasks
from dgemma.text.chat import ChatTemplate
from dgemma.text.tokenizer import Tokenizer
from dgemma.train.data import Conversation, Example, Target, examples
from dgemma.train.sources import FileSource, Mixture, TaskSource, assemble, batches, levels_of

TINY = embedded.HERE / "tiny"


def source(name: str, seed: int = 0) -> TaskSource:
    tokenizer, template = Tokenizer.from_directory(TINY), ChatTemplate.from_directory(TINY)

    def encode(conversation: Conversation) -> list[Example]:
        return examples(conversation, tokenizer, template, 512, 96)

    return TaskSource(*levels_of(name), seed, encode)


def test_a_number_means_an_example() -> None:
    assert source("arithmetic")(5) == source("arithmetic")(5)
    assert source("arithmetic")(5) != source("arithmetic")(6)
    assert source("arithmetic", seed=1)(5) != source("arithmetic")(5)


def test_nothing_held_out_is_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    task = tasks.get("prose")

    class Watched:
        LEVELS = task.LEVELS

        def draw(self, rng, level):
            drawn.append(task.draw(rng, level))
            return drawn[-1]

    made = source("prose:facts")
    watched = TaskSource(Watched(), made.levels, 0, made.encode)
    tokenizer = Tokenizer.from_directory(TINY)
    texts = [tokenizer.decode(list(watched(n).tokens)) for n in range(200)]
    held_out = [item for item in drawn if item.held_out]
    assert held_out
    asked = {item.question[-1]["content"] for item in held_out}
    assert not any(f"user\n{question}<turn|>" in text for question in asked for text in texts)


def test_an_epoch_takes_every_example_of_a_file_once() -> None:
    stored = [Example(array("i", [n, n]), (Target(1, 2, True),)) for n in range(7)]
    taken = [FileSource(stored, seed=3)(n).tokens[0] for n in range(21)]
    epochs = [taken[i : i + 7] for i in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_a_mixture_keeps_its_weights() -> None:
    sources = [lambda number, kind=kind: (kind, number) for kind in "ab"]
    mixture = Mixture(sources, [3.0, 1.0], seed=0)
    found = [example for step in range(100) for example in mixture.batch(step, 10)]
    assert 0.7 < sum(kind == "a" for kind, _ in found) / 1000 < 0.8
    assert len(set(found)) == 1000


def test_workers_make_the_same_batches() -> None:
    mixture = Mixture([source("extraction"), source("tools")], [1.0, 1.0], seed=0)
    with batches(mixture, 3, 4, workers=2) as ahead:
        assert list(itertools.islice(ahead, 4)) == [mixture.batch(step, 4) for step in range(3, 7)]


def test_a_worker_that_fails_is_heard() -> None:
    def broken(number: int) -> Example:
        raise ValueError("no such example")

    with batches(Mixture([broken], [1.0], 0), 0, 2, workers=1) as ahead, pytest.raises(ValueError, match="no such"):
        next(ahead)


def test_a_batch_has_the_canvases_of_all_turns() -> None:
    import random

    tokens = array("i", range(100, 130))
    example = Example(tokens, (Target(3, 12, True), Target(15, 19, True)))
    starts = set()
    for n in range(50):
        batch = assemble([example, example], 2, 4, 1, random.Random(n))
        assert list(batch.owner) == [0, 0, 1, 1]
        for start, clean in zip(batch.start, batch.clean.tolist(), strict=True):
            starts.add(start)
            stop = 12 if start < 12 else 19
            real = list(range(100 + start, 100 + min(start + 4, stop)))
            assert clean == real + [1] * (4 - len(real))
        assert batch.answers == [(0, 3, 12), (0, 15, 19), (1, 3, 12), (1, 15, 19)]
    assert starts == {3, 7, 11, 15}


def test_levels_are_checked_by_name() -> None:
    with pytest.raises(ValueError, match="no level 'easy'; it has add"):
        levels_of("arithmetic:easy")
    assert levels_of("arithmetic:add")[1] == ("add",)
