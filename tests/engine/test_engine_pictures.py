"""Prompts with pictures in the engine: the same answers as alone, pages shared by what the pictures show."""

import random

import pytest
import torch

from dgemma.config import GenerationConfig
from dgemma.decoding.blocks import Request
from dgemma.decoding.noise import Noise
from dgemma.engine.prefix import Pages
from dgemma.engine.scheduler import Limits, Scheduler
from dgemma.model.network import DiffusionGemma
from dgemma.picture import Picture
from tests.engine.test_scheduler import CONFIG, alone, assert_same, run, submit
from tests.parity.reference import randomise, tokens
from tests.parity.vision import picture, prompt_of, with_tower


@pytest.fixture(scope="module")
def model() -> DiffusionGemma:
    model = DiffusionGemma(with_tower(CONFIG, random.Random(2))).eval()
    randomise(model, 0)
    return model


def text(seed: int, length: int) -> list[int]:
    return tokens((length,), CONFIG.vocab_size - 1, seed).tolist()


def ask(model: DiffusionGemma, parts: list[Picture | list[int]], seed: int = 1) -> Request:
    prompt, placed = prompt_of(parts, model.config)
    options = GenerationConfig(max_new_tokens=10, max_denoising_steps=5, eos_token_id=(1, 7))
    noise = Noise(seed, model.config.vocab_size, model.config.canvas_length)
    return Request(prompt, options, noise, pictures=tuple(placed))


def answers(model: DiffusionGemma, asked: list[list[Picture | list[int]]], limits: Limits) -> list[int]:
    """Runs them one after another beside a neighbour, against each alone; returns what each found in the cache."""
    scheduler = Scheduler(model, limits)
    cached = []
    for parts in asked:
        _, neighbour = submit(scheduler, ask(model, [text(5, 9)], 3))
        job, listener = submit(scheduler, ask(model, parts))
        run(scheduler)
        assert listener.errors == [None]
        assert_same(listener.finished, alone(model, ask(model, parts)))
        assert_same(neighbour.finished, alone(model, ask(model, [text(5, 9)], 3)))
        cached.append(job.cached)
    return cached


@pytest.mark.parametrize("prefill", [4, 12, 1024])
def test_answers_are_those_of_each_alone(model: DiffusionGemma, prefill: int) -> None:
    """Pictures across page borders and longer than the window, in chunks of any size, with pages kept and without."""
    small, tall, large = (picture(model.config, *size, i) for i, size in enumerate([(1, 3), (5, 1), (4, 5)]))
    asked: list[list[Picture | list[int]]] = [
        [small, text(1, 6), tall, text(2, 3)],
        [text(1, 3), large, text(2, 9), large, text(3, 2)],
        [text(1, 3), large, text(4, 9), small, text(3, 2)],
        [text(1, 2), tall],
    ]
    found = answers(model, asked, Limits(rows=2, prefill_tokens=prefill))
    assert answers(model, asked, Limits(rows=2, prefill_tokens=prefill, prefix_bytes=0)) == [0] * 4
    assert found[0] == found[1] == 0


def test_pages_are_shared_by_what_the_pictures_show(model: DiffusionGemma) -> None:
    one, other = picture(model.config, 2, 3, 1), picture(model.config, 2, 3, 2)
    again = picture(model.config, 2, 3, 1)
    before, question = text(1, 2), text(2, 20)
    same_text: list[list[Picture | list[int]]] = [
        [before, one, question],
        [before, other, question],
        [before, again, question, text(3, 4)],
        [before, other, text(4, 8)],
    ]
    # Pages of 4 tokens: of 8 that lie before the question, two pages are whole.
    assert answers(model, same_text, Limits()) == [0, 0, 28, 8]


def test_a_conversation_goes_on_behind_its_picture_without_the_tower(model: DiffusionGemma) -> None:
    shown = picture(model.config, 2, 3, 1)
    scheduler = Scheduler(model, Limits())
    submit(scheduler, ask(model, [shown, text(1, 14)]))
    run(scheduler)
    assert model.vision
    calls: list[int] = []
    hook = model.vision.register_forward_hook(lambda *_: calls.append(1))
    job, listener = submit(scheduler, ask(model, [shown, text(1, 14), text(2, 9)]))
    run(scheduler)
    hook.remove()
    assert job.cached == 20
    assert not calls
    assert_same(listener.finished, alone(model, ask(model, [shown, text(1, 14), text(2, 9)])))


def test_a_page_is_known_by_where_its_picture_began(model: DiffusionGemma) -> None:
    shown = picture(model.config, 3, 4, 1)
    ids = []
    for first in (1, 2):
        prompt, placed = prompt_of([text(1, first), shown], model.config)
        pages = Pages(4, pictures=placed)
        pages.extend(prompt)
        ids.append(pages.keys[2])
    assert ids[0] != ids[1]
    assert torch.equal(*(prompt_of([text(1, n), shown], model.config)[0][8:12] for n in (1, 2)))


def test_one_bad_picture_ends_only_its_own_request(model: DiffusionGemma) -> None:
    scheduler = Scheduler(model, Limits())
    _, good = submit(scheduler, ask(model, [picture(model.config, 2, 2, 1), text(1, 4)]))
    _, bad = submit(scheduler, ask(model, [picture(model.config, 1, 25, 1), text(1, 4)]))
    run(scheduler)
    assert "positions" in str(bad.errors[0])
    assert_same(good.finished, alone(model, ask(model, [picture(model.config, 2, 2, 1), text(1, 4)])))
