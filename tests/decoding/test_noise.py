"""Draws are fixed by (seed, block, step, position), uniform, and nobody else's business."""

import numpy as np
import pytest
import torch

from dgemma.decoding.noise import Noise, stacked

RECORDED = {
    "canvas": [228608, 77428, 110126, 106271],
    "renoise": [250191, 151124, 103042, 240637],
    "uniform": [12865080, 10493093, 14285088, 12603535],
}


def draws(noise: Noise, blocks=(0, 1, 2), steps=(1, 2, 3)) -> dict[tuple, torch.Tensor]:
    found = {("canvas", b): noise.canvas(b) for b in blocks}
    found |= {("renoise", b, n): noise.renoise(b, n) for b in blocks for n in steps}
    return found | {("uniform", b, n): noise.uniform(b, n) for b in blocks for n in steps}


def test_shapes_dtypes_and_ranges():
    noise = Noise(0, 1000, 256)
    for name, values in draws(noise).items():
        assert values.shape == (256,)
        assert values.dtype == (torch.float32 if name[0] == "uniform" else torch.int64)
        assert values.min() >= 0
        assert values.max() < (1 if name[0] == "uniform" else 1000)


def test_the_same_in_any_order_and_object():
    first, second = Noise(42, 1000, 64), Noise(42, 1000, 64)
    expected = draws(first)
    backwards = draws(second, blocks=(2, 1, 0), steps=(3, 2, 1))
    assert all(torch.equal(expected[name], backwards[name]) for name in expected)
    assert all(torch.equal(first.uniform(1, 2), values) for values in [first.uniform(1, 2) for _ in range(3)])


def test_the_same_on_any_machine():
    """Written down once: a change of the generator would silently change every seeded answer."""
    noise = Noise(7, 262_144, 4)
    assert noise.canvas(0).tolist() == RECORDED["canvas"]
    assert noise.renoise(1, 3).tolist() == RECORDED["renoise"]
    assert (noise.uniform(2, 48) * 2**24).int().tolist() == RECORDED["uniform"]


def test_a_longer_canvas_begins_with_the_shorter_one():
    short, long = draws(Noise(5, 100, 32)), draws(Noise(5, 100, 256))
    assert all(torch.equal(values, long[name][:32]) for name, values in short.items())


def test_seed_block_step_and_kind_all_matter():
    every = [tuple(v.tolist()) for seed in (0, 1, 2**63, 2**64 - 1) for v in draws(Noise(seed, 2**30, 8)).values()]
    assert len(set(every)) == len(every)
    kinds = [Noise(0, 2**24, 8).renoise(1, 1), (Noise(0, 2**24, 8).uniform(1, 1) * 2**24).long()]
    assert not torch.equal(*kinds)


def test_global_generators_have_no_part():
    noise = Noise(3, 100, 16)
    torch.manual_seed(0)
    np.random.seed(0)
    before = noise.canvas(0), torch.get_rng_state()
    torch.manual_seed(1)
    np.random.seed(1)
    state = torch.get_rng_state()
    assert torch.equal(before[0], noise.canvas(0))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("vocabulary", [10, 61])
def test_tokens_are_uniform(vocabulary):
    """Chi-square within five standard deviations, for a size that does not divide 2^32."""
    noise = Noise(11, vocabulary, 4000)
    for values in (noise.canvas(0), noise.renoise(0, 1), noise.renoise(3, 7)):
        counts = values.bincount(minlength=vocabulary).double()
        expected = 4000 / vocabulary
        chi = float(((counts - expected) ** 2 / expected).sum())
        assert abs(chi - (vocabulary - 1)) < 5 * (2 * (vocabulary - 1)) ** 0.5
        pairs = torch.corrcoef(torch.stack((values[:-1], values[1:])).double())[0, 1]
        assert abs(float(pairs)) < 5 / 4000**0.5


def test_uniforms_are_uniform():
    noise = Noise(11, 10, 4000)
    steps = torch.stack([noise.uniform(b, n) for b in range(3) for n in range(1, 5)]).double()
    ascending = steps.flatten().sort().values
    ideal = torch.linspace(0, 1, len(ascending), dtype=torch.float64)
    assert float((ascending - ideal).abs().max()) < 2 / len(ascending) ** 0.5
    correlation = torch.corrcoef(steps) - torch.eye(len(steps), dtype=torch.float64)
    assert float(correlation.abs().max()) < 5 / 4000**0.5


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_outside_64_bits_are_named(seed):
    with pytest.raises(ValueError, match=str(seed)):
        Noise(seed, 10, 4)


def test_stacked():
    rows = stacked([Noise(s, 10, 4).canvas(0) for s in range(3)], torch.device("cpu"))
    assert rows.shape == (3, 4)
    assert torch.equal(rows[1], Noise(1, 10, 4).canvas(0))
