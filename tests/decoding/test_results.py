"""What a generation reports: reasons, steps, convergence, limits, positions; and rows that mind their own business."""

from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from parity.reference import randomise, tokens
from parity.trajectory import CONFIG, OPTIONS, calm, noises, our_trajectories

from dgemma.decoding import blocks
from dgemma.decoding.blocks import Request
from dgemma.decoding.denoise import Canvas
from dgemma.decoding.events import Block, Event, Finished, Prefilled, Step
from dgemma.model.network import DiffusionGemma

NEVER = (CONFIG.vocab_size + 1,)
C = CONFIG.canvas_length


@lru_cache(maxsize=1)
def model() -> DiffusionGemma:
    model = DiffusionGemma(CONFIG).eval()
    randomise(model, 7)
    with torch.no_grad():
        calm(model)
    return model


def run(*prompts: torch.Tensor, seed: int = 0, cache=None, **options) -> list[Event]:
    chosen = replace(OPTIONS, **options)
    requests = [Request(p, chosen, n) for p, n in zip(prompts, noises(seed, len(prompts)), strict=True)]
    return list(blocks.generate(model(), requests, cache))


def prompt(length: int, seed: int = 0) -> torch.Tensor:
    return tokens((length,), CONFIG.vocab_size, seed)


def settled(best: list[int], *kept: int, limit: int = 20, ends: tuple[int, ...] = (1, 106, 50)) -> tuple[list, str]:
    """What one canvas adds to a text that has `kept` tokens, and the reason it ends for, if it does."""
    request = Request(prompt(1), replace(OPTIONS, max_new_tokens=limit, eos_token_id=ends), noises(0, 1)[0])
    request.tokens = list(kept)
    canvas = Canvas.begin(model(), 0, 0, request.options, request.noise)
    canvas.history, canvas.steps, canvas.still = [torch.tensor(best)], 3, True
    block = request.settle(canvas)
    assert request.tokens == [*kept, *block.tokens]
    return block.tokens, request.reason


@pytest.mark.parametrize("end", [1, 106, 50])
def test_each_end_token_stops_and_stays(end):
    assert settled([7, 8, end, 9, 9, 9, 9, 9]) == ([7, 8, end], "stop")


def test_the_first_of_several_end_tokens_counts():
    assert settled([7, 50, 1, 106, 9, 1, 9, 9]) == ([7, 50], "stop")


def test_no_end_token_goes_on():
    assert settled([7] * 8) == ([7] * 8, "")


def test_the_limit_cuts_a_canvas():
    assert settled([7, 8, 9, 7, 8, 9, 7, 8], *range(3), limit=8) == ([7, 8, 9, 7, 8], "length")


def test_the_limit_at_the_end_of_a_canvas():
    assert settled([7] * 8, limit=8) == ([7] * 8, "length")


def test_an_end_token_just_within_the_limit():
    assert settled([7, 8, 9, 1, 0, 0, 0, 0], limit=4) == ([7, 8, 9, 1], "stop")


def test_an_end_token_beyond_the_limit_is_not_seen():
    assert settled([7, 8, 9, 7, 1, 0, 0, 0], limit=4) == ([7, 8, 9, 7], "length")


def test_events_are_in_order_and_agree():
    events = run(prompt(5), prompt(9, 1), seed=3)
    for row, length in enumerate((5, 9)):
        mine = [e for e in events if e.row == row]
        assert isinstance(mine[0], Prefilled)
        assert (mine[0].tokens, mine[0].cached) == (length, 0)
        assert isinstance(mine[-1], Finished)
        steps = [e for e in mine if isinstance(e, Step)]
        ends = [e for e in mine if isinstance(e, Block)]
        assert [e.block for e in ends] == list(range(len(ends)))
        for end in ends:
            own = [s for s in steps if s.block == end.block]
            assert [s.step for s in own] == list(range(1, end.steps + 1))
            assert [s.still for s in own] == [False] * (end.steps - 1) + [end.converged]
            assert own[-1].best.tolist()[: len(end.tokens)] == end.tokens
            for s in own:
                assert s.mean_entropy == pytest.approx(float(s.entropy.mean()), abs=1e-6)
                assert s.accepted.any()
        last = mine[-1]
        assert last.tokens == [token for end in ends for token in end.tokens]
        assert (last.steps, last.converged) == ([e.steps for e in ends], [e.converged for e in ends])
        assert last.tokens_per_forward == len(last.tokens) / sum(last.steps)
        assert last.prompt_tokens == length


def test_stop_and_length_both_come_about():
    rows = [run(prompt(4, seed), seed=seed)[-1] for seed in range(12)]
    assert {row.reason for row in rows} == {"stop", "length"}
    for row in rows:
        assert (row.reason == "stop") == (row.tokens[-1] in OPTIONS.eos_token_id)
        assert row.reason == "stop" or len(row.tokens) == OPTIONS.max_new_tokens


def test_a_cap_is_reported_as_not_converged():
    last = run(prompt(4), max_denoising_steps=2, confidence_threshold=1e-9, eos_token_id=NEVER)[-1]
    assert (last.steps, last.converged) == ([2, 2, 2], [False, False, False])
    assert last.reason == "length"


def test_stillness_on_the_last_step_is_convergence():
    natural = run(prompt(4), max_new_tokens=C, t_min=0.5, t_max=0.5, max_denoising_steps=40, eos_token_id=NEVER)[-1]
    assert natural.converged == [True]
    (steps,) = natural.steps
    options = {"max_new_tokens": C, "t_min": 0.5, "t_max": 0.5, "eos_token_id": NEVER}
    exactly = run(prompt(4), max_denoising_steps=steps, **options)[-1]
    assert (exactly.steps, exactly.converged, exactly.tokens) == ([steps], [True], natural.tokens)
    short = run(prompt(4), max_denoising_steps=steps - 1, **options)[-1]
    assert (short.steps, short.converged) == ([steps - 1], [False])


def test_a_given_cache_gives_the_same_answer():
    whole = run(prompt(20), seed=4)
    cache = model().new_cache()
    with torch.no_grad():
        model().encode([prompt(20)[:13]], cache)
    parts = run(prompt(20)[13:], seed=4, cache=cache)
    assert parts[-1].tokens == whole[-1].tokens
    assert parts[-1].steps == whole[-1].steps
    assert (parts[0].tokens, parts[0].cached, parts[-1].prompt_tokens) == (7, 13, 20)


def test_rows_do_not_depend_on_the_batch():
    """Alone, together and in another order: the same canvases; and options are each row's own."""
    rows = [prompt(length, length) for length in (3, 17, 9, 3)]
    noise = noises(6, 4)
    together = our_trajectories(model(), rows, OPTIONS, noise)
    assert len({tuple(row.steps) for row in together}) > 1
    backwards = our_trajectories(model(), rows[::-1], OPTIONS, noise[::-1])[::-1]
    for i, row in enumerate(rows):
        (alone,) = our_trajectories(model(), [row], OPTIONS, noise[i : i + 1])
        assert together[i].blocks == alone.blocks == backwards[i].blocks
    mixed = [replace(OPTIONS, max_denoising_steps=4), replace(OPTIONS, entropy_bound=3.0), OPTIONS, OPTIONS]
    requests = [Request(p, o, n) for p, o, n in zip(rows, mixed, noise, strict=True)]
    ends = {e.row: e for e in blocks.generate(model(), requests) if isinstance(e, Finished)}
    for i, row in enumerate(rows):
        (alone,) = our_trajectories(model(), [row], mixed[i], noise[i : i + 1])
        assert (ends[i].tokens, ends[i].steps) == (alone.tokens, alone.steps)


def test_wrong_requests_are_named():
    with pytest.raises(ValueError, match="prompt of row 1 is empty"):
        run(prompt(3), prompt(0))
    with pytest.raises(ValueError, match=r"need 129 positions; the model has 128"):
        run(prompt(121 - 2 * C), max_new_tokens=3 * C)
    with pytest.raises(ValueError, match="the cache has 2 rows for 1 requests"):
        run(prompt(3), cache=model().new_cache(2))
    last = run(prompt(120 - 2 * C), max_new_tokens=3 * C, max_denoising_steps=1, eos_token_id=NEVER)[-1]
    assert len(last.tokens) == 3 * C


def test_greedy_rows_accept_the_best_and_leave_their_neighbours_alone():
    drawn = [e for e in run(prompt(5), prompt(6, 1), t_max=2.0) if isinstance(e, Step)]
    greedy = [e for e in run(prompt(5), prompt(6, 1), t_max=2.0, greedy=True) if isinstance(e, Step)]
    assert all(torch.equal(e.canvas[e.accepted], e.best[e.accepted]) for e in greedy)
    assert not all(torch.equal(e.canvas[e.accepted], e.best[e.accepted]) for e in drawn)
    requests = [Request(prompt(5), replace(OPTIONS, greedy=g), noises(0, 1)[0]) for g in (False, True)]
    mixed = [e for e in blocks.generate(model(), requests) if isinstance(e, Step) and e.row == 0]
    alone = [e for e in run(prompt(5)) if isinstance(e, Step)]
    assert [e.canvas.tolist() for e in mixed] == [e.canvas.tolist() for e in alone]
