"""Whole generations against the reference's `generate` with the same draws: every canvas, step by step."""

from dataclasses import replace
from functools import cache, lru_cache
from typing import Any

import pytest
import torch
from parity.reference import make_reference, tokens
from parity.trajectory import CONFIG, OPTIONS, Trajectory, calm, noises, our_trajectories, reference_trajectories

from dgemma.model.network import DiffusionGemma

SEEDS = range(24)
ROWS = 3


@lru_cache(maxsize=1)
def pair() -> tuple[DiffusionGemma, Any]:
    return make_reference(CONFIG, 7, calm)


def prompts(seed: int) -> torch.Tensor:
    """int64 [3, 3 … 26]: shorter and longer than the window of 7 and the pages of 8."""
    return tokens((ROWS, 3 + seed), CONFIG.vocab_size, seed)


@cache
def ours(seed: int) -> list[Trajectory]:
    return our_trajectories(pair()[0], list(prompts(seed)), OPTIONS, noises(seed, ROWS))


def assert_equal(mine: Trajectory, theirs: Trajectory) -> None:
    assert mine.steps == theirs.steps
    assert mine.blocks == theirs.blocks
    assert mine.tokens == theirs.tokens
    if OPTIONS.pad_token_id not in mine.tokens:  # the reference does not count these
        assert mine.tokens_per_forward == pytest.approx(theirs.tokens_per_forward)


@pytest.mark.parametrize("seed", SEEDS)
def test_identical_to_the_reference(seed):
    reference = reference_trajectories(pair()[1], prompts(seed), OPTIONS, noises(seed, ROWS))
    for mine, theirs in zip(ours(seed), reference, strict=True):
        assert_equal(mine, theirs)


def test_the_generations_are_varied():
    """What the comparison covers: rows that stop apart, caps, several blocks, ends within a canvas."""
    batches = [ours(seed) for seed in SEEDS]
    rows = [row for batch in batches for row in batch]
    assert sum(len({row.steps[0] for row in batch}) > 1 for batch in batches) > len(batches) // 2
    assert {2, 3} <= {len(row.blocks) for row in rows}
    assert {True, False} == {still for row in rows for still in row.converged}
    assert len({steps for row in rows for steps in row.steps}) >= 6
    ends = [row.tokens[-1] in OPTIONS.eos_token_id and len(row.tokens) % CONFIG.canvas_length for row in rows]
    assert sum(map(bool, ends)) >= 5
    assert sum(not end for end in ends) >= 5
    assert any(len({len(row.blocks) for row in batch}) > 1 for batch in batches), "rows end in the same block"
    assert sum(OPTIONS.pad_token_id not in row.tokens for row in rows) > len(rows) // 3
    noisy = [canvas != best for row in rows for block in row.blocks for canvas, best in block]
    assert any(noisy)


def test_rounding_cannot_turn_a_decision():
    """The same generations come out of weights that differ in the seventh digit: the comparison above is no luck."""
    model, _ = make_reference(CONFIG, 7, calm)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 3e-7 * torch.randn(parameter.shape, generator=generator))
    for seed in SEEDS:
        shaken = our_trajectories(model, list(prompts(seed)), OPTIONS, noises(seed, ROWS))
        assert [row.blocks for row in shaken] == [row.blocks for row in ours(seed)]


@pytest.mark.parametrize("seed", range(4))
def test_rows_of_different_prompts_match_the_reference_alone(seed):
    different = [prompts(seed)[0], prompts(seed + 9)[1], prompts(seed + 16)[2]]
    noise = noises(100 + seed, ROWS)
    together = our_trajectories(pair()[0], different, OPTIONS, noise)
    for row, mine in enumerate(together):
        (alone,) = reference_trajectories(pair()[1], different[row][None], OPTIONS, noise[row : row + 1])
        assert_equal(mine, alone)


@pytest.mark.parametrize(
    "options",
    [
        {"stability_threshold": 0},
        {"stability_threshold": 3},
        {"entropy_bound": 3.0, "t_min": 0.1, "t_max": 2.0},
        {"max_denoising_steps": 1},
        {"max_new_tokens": 8, "max_denoising_steps": 30, "confidence_threshold": 1e-6},
    ],
)
def test_other_options(options):
    changed = replace(OPTIONS, **options)
    rows = our_trajectories(pair()[0], list(prompts(5)), changed, noises(5, ROWS))
    reference = reference_trajectories(pair()[1], prompts(5), changed, noises(5, ROWS))
    for mine, theirs in zip(rows, reference, strict=True):
        assert mine.blocks == theirs.blocks
    if "max_denoising_steps" not in options:
        assert [row.blocks for row in rows] != [row.blocks for row in ours(5)]


def test_a_limit_within_a_canvas_cuts_the_reference():
    """The reference returns whole canvases; ours are the same, cut to the limit."""
    changed = replace(OPTIONS, max_new_tokens=13, eos_token_id=(CONFIG.vocab_size - 1,))
    rows = our_trajectories(pair()[0], list(prompts(2)), changed, noises(2, ROWS))
    reference = reference_trajectories(pair()[1], prompts(2), changed, noises(2, ROWS))
    for mine, theirs in zip(rows, reference, strict=True):
        assert mine.blocks == theirs.blocks
        assert len(mine.blocks) == 2
        assert mine.tokens == theirs.tokens[:13]
    assert any(len(row.tokens) == 13 for row in rows)
