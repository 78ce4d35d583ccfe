"""The image tower against the reference's, over random shapes and padded batches."""

import random

import pytest
import torch
from parity.reference import distance, random_config
from parity.vision import inputs, make_pair, picture, with_tower

SEEDS = range(16)
LIMIT = 1e-4
"""Largest difference in float32, as a share of the soft tokens' root mean square."""
SIZES = [(1, 1), (2, 3), (3, 1), (1, 5), (2, 2)]


@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_soft_tokens_equal_the_reference(seed):
    rng = random.Random(seed)
    config = with_tower(random_config(rng), rng)
    ours, theirs = make_pair(config, seed)
    pictures = [picture(config, *size, seed + i) for i, size in enumerate(SIZES)]
    k = config.vision.pooling_kernel_size
    padded = inputs(pictures, 7 * k * k)
    reference = theirs.model.encoder.get_image_features(**padded).pooler_output
    found = ours.see(pictures)
    assert [len(soft) for soft in found] == [rows * columns for rows, columns in SIZES]
    assert distance(torch.cat(found), reference) <= LIMIT
    # Each alone is what it is among others: nothing is seen of a neighbour.
    assert distance(torch.cat([ours.see([each])[0] for each in pictures]), reference) <= LIMIT


def test_configs_are_varied():
    configs = []
    for seed in SEEDS:
        rng = random.Random(seed)
        configs.append(with_tower(random_config(rng), rng).vision)
    for name in ("head_dim", "num_attention_heads", "patch_size", "pooling_kernel_size", "standardize", "rope_theta"):
        assert len({getattr(config, name) for config in configs}) > 1, name
    assert len({config.use_clipped_linears for config in configs}) == 2


@torch.no_grad()
def test_place_matters_and_the_bounds_bite():
    """What the comparison could be blind to."""
    rng = random.Random(1)
    config = with_tower(random_config(rng), rng, use_clipped_linears=True, pooling_kernel_size=2)
    ours, _ = make_pair(config, 1)
    tall, wide = picture(config, 3, 2, 5), picture(config, 2, 3, 5)
    assert (tall.patches == wide.patches).all()
    assert distance(ours.see([tall])[0], ours.see([wide])[0]) > 100 * LIMIT
    bounded = ours.see([tall])[0]
    for name, tensor in ours.vision.state_dict().items():
        if name.endswith(("_min", "_max")):
            tensor.mul_(100)
    assert distance(ours.see([tall])[0], bounded) > 100 * LIMIT


@torch.no_grad()
def test_bfloat16_is_close():
    rng = random.Random(3)
    config = with_tower(random_config(rng), rng, standardize=True)
    ours, theirs = make_pair(config, 3)
    pictures = [picture(config, 4, 5, 3)]
    exact = ours.see(pictures)[0]
    padded = inputs(pictures, 20 * config.vision.pooling_kernel_size**2)
    ours, theirs = ours.to(torch.bfloat16), theirs.to(torch.bfloat16)
    reference = theirs.model.encoder.get_image_features(**padded).pooler_output.float()
    error = lambda x: float((x - exact).square().mean().sqrt() / exact.square().mean().sqrt())  # noqa: E731
    assert error(ours.see(pictures)[0].float()) <= 3 * error(reference)
    assert error(reference) < 0.3
