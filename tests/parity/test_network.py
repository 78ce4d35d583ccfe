"""The network against the public reference with the same weights, over random shapes."""

import copy
import random
from functools import cache
from typing import Any

import pytest
import torch
from parity.reference import (
    distance,
    make_reference,
    our_logits,
    random_config,
    reference_causal_logits,
    reference_logits,
    tokens,
)
from safetensors.torch import load_file
from torch import Tensor

from dgemma.checkpoints.load import load_model
from dgemma.config import FULL, SLIDING, ModelConfig
from dgemma.model.network import DiffusionGemma

SEEDS = range(24)
LIMIT = 1e-4
"""Largest difference in float32, as a share of the logits' root mean square."""
BF16_OURS, BF16_SHARE = 0.1, 1.25
"""In bfloat16 the median position is this close to the reference's, and its error at most this share of theirs."""


@cache
def pair(seed: int) -> tuple[DiffusionGemma, Any]:
    return make_reference(random_config(random.Random(seed)), seed)


def inputs(config: ModelConfig, length: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Prompt [2, length], canvas [2, C] and previous logits [2, C, V]."""
    prompt = tokens((2, length), config.vocab_size, seed)
    canvas = tokens((2, config.canvas_length), config.vocab_size, seed + 1)
    generator = torch.Generator().manual_seed(seed + 2)
    return prompt, canvas, 4 * torch.randn(2, config.canvas_length, config.vocab_size, generator=generator)


def prefix_lengths(config: ModelConfig) -> tuple[int, ...]:
    """Within the window, at its edge, and beyond it and several pages."""
    return 2, config.sliding_window, 2 * max(config.sliding_window, config.canvas_length) + 3


def test_configs_are_varied():
    configs = [pair(seed)[0].config for seed in SEEDS]
    for name in ("layer_types", "num_key_value_heads", "num_global_key_value_heads", "head_dim", "global_head_dim"):
        assert len({getattr(c, name) for c in configs}) > 1
    for name in ("sliding_window", "num_experts", "top_k_experts", "canvas_length", "rope_full", "rms_norm_eps"):
        assert len({getattr(c, name) for c in configs}) > 1
    assert any(SLIDING in c.layer_types for c in configs)
    assert any(c.layer_types == (FULL,) for c in configs)


def test_no_scale_is_one():
    for name, tensor in pair(0)[0].state_dict().items():
        assert not torch.any(tensor == 1), name
    assert all(layer.layer_scalar != layer.encoder_layer_scalar for layer in pair(0)[0].layers)


@pytest.mark.parametrize("seed", SEEDS)
def test_denoise(seed):
    ours, theirs = pair(seed)
    for length in prefix_lengths(ours.config):
        prompt, canvas, previous = inputs(ours.config, length, seed)
        first = reference_logits(theirs, prompt, canvas)
        assert distance(our_logits(ours, prompt, canvas), first) <= LIMIT
        conditioned = reference_logits(theirs, prompt, canvas, previous)
        assert distance(our_logits(ours, prompt, canvas, previous), conditioned) <= LIMIT
        assert distance(first, conditioned) > 100 * LIMIT, "self-conditioning has no effect: the test is blind to it"


@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_causal_logits(seed):
    ours, theirs = pair(seed)
    prompt, _, _ = inputs(ours.config, prefix_lengths(ours.config)[-1], seed)
    rows = ours.encode(prompt, ours.new_cache(2), logits=True)
    assert distance(torch.stack(rows), reference_causal_logits(theirs, prompt)) <= LIMIT


@pytest.mark.parametrize("off_by", [-1, 1])
def test_reach_of_the_window_is_seen(monkeypatch, off_by):
    """A sliding layer that sees one cached token more or less than the reference's does not pass for equal."""
    seed = next(s for s in SEEDS if SLIDING in pair(s)[0].config.layer_types)
    ours, theirs = pair(seed)
    prompt, canvas, _ = inputs(ours.config, prefix_lengths(ours.config)[-1], seed)
    cache = ours.new_cache(2)
    with torch.no_grad():
        ours.encode(prompt, cache)
        assert distance(ours.denoise(canvas, cache), reference_logits(theirs, prompt, canvas)) <= LIMIT
        reach = ours.config.prefix_window + off_by
        monkeypatch.setattr(ModelConfig, "prefix_window", reach)
        cache = ours.new_cache(2)
        ours.encode(prompt, cache)
        assert distance(ours.denoise(canvas, cache), reference_logits(theirs, prompt, canvas)) > 10 * LIMIT


def in_bfloat16(theirs: Any) -> Any:
    """The reference in bfloat16, with its frequencies in float32 as from_pretrained leaves them."""
    theirs = copy.deepcopy(theirs)
    frequencies = {name: buffer for name, buffer in theirs.named_buffers() if name.endswith("inv_freq")}
    theirs.to(torch.bfloat16)
    for name, buffer in frequencies.items():
        module, _, own = name.rpartition(".")
        setattr(theirs.get_submodule(module), own, buffer)
    return theirs


def test_bfloat16():
    """Roundings differ, and may turn a router's choice at a position: so the median position is what is compared."""
    errors_ours, errors_theirs = [], []
    for seed in SEEDS:
        ours, theirs = pair(seed)
        prompt, canvas, previous = inputs(ours.config, prefix_lengths(ours.config)[-1], seed)
        exact = reference_logits(theirs, prompt, canvas, previous)
        scale = exact.square().mean().sqrt()
        median = lambda x: float(x.square().mean(-1).sqrt().median() / scale)  # noqa: B023, E731
        ours, theirs = copy.deepcopy(ours).to(torch.bfloat16), in_bfloat16(theirs)
        rounded = our_logits(ours, prompt, canvas, previous)
        reference = reference_logits(theirs, prompt, canvas, previous.to(torch.bfloat16))
        assert rounded.dtype == torch.float32
        assert median(rounded - reference) <= BF16_OURS, seed
        errors_ours.append(median(rounded - exact))
        errors_theirs.append(median(reference - exact))
    assert sum(errors_ours) <= BF16_SHARE * sum(errors_theirs)
    assert min(errors_ours) > 0


@torch.no_grad()
def test_golden_logits(shared):
    golden = load_file(shared / "small" / "golden.safetensors")
    model = load_model(shared / "small", torch.device("cpu"), "float32")
    cache = model.new_cache()
    model.encode(golden["tokens"], cache)
    assert golden["tokens"].shape[1] > model.config.sliding_window
    assert distance(model.denoise(golden["canvas"], cache), golden["logits_first"]) <= LIMIT
    conditioned = model.denoise(golden["canvas"], cache, golden["previous_logits"])
    assert distance(conditioned, golden["logits_conditioned"]) <= LIMIT
    assert distance(golden["logits_first"], golden["logits_conditioned"]) > 100 * LIMIT
