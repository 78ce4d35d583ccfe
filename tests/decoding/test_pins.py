"""Pinned tokens, drafts and automata in the loop: exact in the result, and counted nowhere."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from decoding.test_results import NEVER, C, model, prompt
from parity.trajectory import CONFIG, OPTIONS, noises

from dgemma.config import GenerationConfig
from dgemma.decoding import blocks
from dgemma.decoding.blocks import Request
from dgemma.decoding.constraint import TokenAutomaton
from dgemma.decoding.events import Event, Finished, Step
from dgemma.decoding.pins import Known
from dgemma.engine.scheduler import Limits, Scheduler

V = CONFIG.vocab_size


def request(known: Known, seed: int = 0, **options) -> Request:
    chosen = replace(OPTIONS, **{"eos_token_id": NEVER, **options})
    return Request(prompt(6, seed), chosen, noises(seed, 1)[0], known)


def run(*requests: Request) -> list[Event]:
    return list(blocks.generate(model(), requests))


def answer(known: Known, seed: int = 0, **options) -> Finished:
    *_, last = run(request(known, seed, **options))
    assert isinstance(last, Finished)
    return last


def test_pins_stay_whatever_the_model_believes():
    rng = np.random.default_rng(0)
    for seed in range(12):
        places = rng.choice(3 * C, rng.integers(1, 2 * C), replace=False)
        pins = {int(place): int(rng.integers(V)) for place in places}
        free = 3 * C - len(pins)
        told = answer(Known(pins), seed, max_new_tokens=free, max_denoising_steps=int(rng.integers(1, 6)))
        assert [told.tokens[place] for place in pins] == list(pins.values())
        assert len(told.tokens) == 3 * C  # the pins cost nothing of the limit


def test_the_limit_counts_what_is_not_pinned():
    assert len(answer(Known(), max_new_tokens=5).tokens) == 5
    assert len(answer(Known({0: 3, 4: 3}), max_new_tokens=5).tokens) == 7
    # Pins right behind the limit belong to the answer: the suffix of a gap.
    assert len(answer(Known({5: 3, 6: 3, 7: 3}), max_new_tokens=5).tokens) == 8
    with pytest.raises(ValueError, match=r"the pin at 6 lies behind the answer, which ends before 5"):
        answer(Known({6: 3}), max_new_tokens=5)


def test_pinned_end_tokens_end_nothing_and_no_other_stands_before_a_pin():
    every = tuple(range(V // 2))  # so likely that a free canvas holds some
    free = answer(Known(), eos_token_id=every, max_new_tokens=2 * C)
    assert len(free.tokens) < 2 * C
    pins = {2: 0, C + 3: 1}
    told = answer(Known(pins), eos_token_id=every, max_new_tokens=2 * C - 2)
    assert [told.tokens[place] for place in pins] == [0, 1]
    between = [token for place, token in enumerate(told.tokens[: C + 3]) if place not in pins]
    assert not any(token in every for token in between)
    assert told.reason == "stop" or len(told.tokens) == 2 * C


def test_a_canvas_of_pins_alone_takes_no_step():
    pins = dict.fromkeys(range(C, 2 * C), 7)
    events = run(request(Known(pins), max_new_tokens=2 * C))
    last = events[-1]
    assert last.steps[1] == 0
    assert last.converged[1]
    assert last.tokens[C : 2 * C] == [7] * C
    assert {event.block for event in events if isinstance(event, Step)} == {0, 2}


def test_a_step_with_pins_is_the_networks_own():
    """Step by step against `denoise`, which knows nothing of pins: one-hot beliefs go in as logits."""
    pins, seed, steps = {0: 5, 3: 9, C - 1: 2}, 4, 5
    asked = request(Known(pins), seed, max_new_tokens=C - 3, max_denoising_steps=steps, confidence_threshold=0.0)
    seen = [event for event in run(asked) if isinstance(event, Step)]
    network, noise, places = model(), noises(seed, 1)[0], list(pins)
    cache = network.new_cache(1)
    certain = torch.full((3, V), -1e9)
    certain[range(3), list(pins.values())] = 0
    free = [i for i in range(C) if i not in pins]
    with torch.inference_mode():
        network.encode([asked.prompt], cache)
        canvas, previous = noise.canvas(0), None
        canvas[places] = torch.tensor(list(pins.values()))
        for n, step in enumerate(seen, 1):
            temperature = asked.options.temperature(steps - n + 1)
            assert step.temperature == pytest.approx(temperature)
            logits = network.denoise(canvas[None], cache, previous)[0] / temperature
            p = logits.double().softmax(-1)
            entropy = -(p * p.log()).sum(-1)
            assert step.best[free].tolist() == p.argmax(-1)[free].tolist()
            assert torch.allclose(step.entropy[free].double(), entropy[free], atol=1e-4)
            assert step.mean_entropy == pytest.approx(float(entropy[free].mean()), abs=1e-4)
            order = sorted(free, key=lambda i: float(step.entropy[i]))
            before = np.cumsum([0.0, *(float(step.entropy[i]) for i in order)])[:-1]
            kept = {i for i, sum in zip(order, before, strict=True) if sum <= asked.options.entropy_bound}
            assert {i for i in free if step.accepted[i]} == kept
            assert step.accepted[places].all()
            assert step.canvas[places].tolist() == list(pins.values())
            renoised = [i for i in free if i not in kept]
            assert step.canvas[renoised].tolist() == noise.renoise(0, n)[renoised].tolist()
            canvas, previous = step.canvas, logits[None].clone()
            previous[0, places] = certain


def test_rows_with_pins_and_others_do_not_mind_each_other():
    known = [
        Known({1: 4, C + 2: 4}),
        Known(),
        Known(draft=[5] * C, level=0.5),
        Known({0: 1, 1: V - 1}, constraint=every_other()),
    ]
    made = lambda: [request(k, seed, max_new_tokens=2 * C) for seed, k in enumerate(known)]  # noqa: E731
    together = {event.row: event for event in run(*made()) if isinstance(event, Finished)}
    for row, alone in enumerate(made()):
        *_, last = run(alone)
        assert together[row].tokens == last.tokens
        assert together[row].steps == last.steps
    scheduler, told = Scheduler(model(), Limits(rows=3)), {}
    for row, asked in enumerate(made()):
        scheduler.submit(asked, lambda event, row=row: told.__setitem__(row, event), lambda error: None)
    while not scheduler.idle:
        scheduler.step()
    assert {row: event.tokens for row, event in told.items()} == {row: e.tokens for row, e in together.items()}


def every_other() -> TokenAutomaton:
    """Texts in which tokens of the first and of the second half of the vocabulary take turns, any number of times."""
    classes = np.where(np.arange(V) < V // 2, 1, 2).astype(np.int32)
    table = np.array([[-1, 1, -1], [-1, -1, 0]], np.int32)
    return TokenAutomaton(classes, table, np.array([True, False]))


def test_an_automaton_is_kept_to_across_blocks_and_pins():
    for seed in range(8):
        pins = {3: V - 1, C: 2}
        steps, limit = 1 + seed % 4, 3 * C - 2 if C % 2 == 0 else 3 * C - 3
        told = answer(Known(pins, constraint=every_other()), seed, max_new_tokens=limit, max_denoising_steps=steps)
        assert [told.tokens[place] for place in pins] == list(pins.values())
        assert every_other().after(told.tokens) == 0


def test_what_cannot_be_is_refused_before_anything_is_done():
    automaton = every_other()
    for known, message in (
        (Known({3: 0}, constraint=automaton), "together with the pins"),
        (Known(constraint=automaton), "no answer of at most 3 tokens fits the constraint"),
        (Known({0: V}), f"a pin holds token {V}, which is not in 0 … {V - 1}"),
        (Known(draft=[V]), f"the draft holds token {V}"),
    ):
        with pytest.raises(ValueError, match=message):
            answer(known, max_new_tokens=3)
    with pytest.raises(ValueError, match="the pin at -1 lies before the answer"):
        Known({-1: 3})
    for level in (0.0, -1.0, 1.5):
        with pytest.raises(ValueError, match="noise level"):
            Known(level=level)


def test_a_draft_is_where_the_canvas_begins_and_the_schedule_is_entered_later():
    draft, options = [11] * (C + 3), {"max_new_tokens": 2 * C, "max_denoising_steps": 8, "confidence_threshold": 0.0}
    for level in (0.01, 0.3, 1.0):
        asked = request(Known(draft=draft, level=level), **options)
        canvas = blocks.begin(model(), 0, asked)
        noise = asked.noise.canvas(0)
        kept = canvas.tokens == 11
        assert torch.equal(canvas.tokens[~kept], noise[~kept])
        assert kept.float().mean() >= (1 - level) * 0.5
        first, *_ = (event for event in run(asked) if isinstance(event, Step))
        steps = math.ceil(level * 8)
        assert first.temperature == pytest.approx(GenerationConfig().temperature(round(steps * 48 / 8)))
        assert asked.steps == [steps, steps]
    # Behind the draft there is noise.
    asked.tokens, asked.steps = [0] * C, [1]
    later = blocks.begin(model(), 0, request(Known(draft=draft, level=0.01), **options))
    assert (later.tokens == 11).float().mean() > 0.9
    second = blocks.begin(model(), 0, asked)
    assert torch.equal(second.tokens[3:], asked.noise.canvas(1)[3:])
