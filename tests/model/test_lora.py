"""LoRA beside dense weights W + scale * B A, over random shapes of the network."""

import copy
import random
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from parity.reference import distance, our_logits, random_config, randomise, tokens
from torch import Tensor

from dgemma.config import FULL, SLIDING, VisionConfig
from dgemma.model.lora import Lora, adapter_state, add_lora, merge_lora
from dgemma.model.network import DiffusionGemma

ALL = Lora(rank=3, alpha=5.0, parts=("attention", "mlp", "experts", "self_conditioning", "router"))
SEEDS = range(6)


def network(seed: int, dtype: torch.dtype = torch.float32) -> DiffusionGemma:
    model = DiffusionGemma(random_config(random.Random(seed))).eval()
    randomise(model, seed)
    return model.to(dtype)


@torch.no_grad()
def randomise_adapters(model: DiffusionGemma, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for tensor in adapter_state(model).values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.15)


def dense(plain: DiffusionGemma, state: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The plain network's tensors with every update added, by way of einsum; differentiable in `state`."""
    weights = dict(plain.state_dict())
    for a in [name for name in state if name.endswith(".A")]:
        name = a.removesuffix(".A")
        weights[name] = weights[name] + scale * torch.einsum("...or,...ri->...oi", state[f"{name}.B"], state[a])
    return weights


def logits(model: DiffusionGemma, seed: int) -> list[Tensor]:
    """Both modes: a causal pass beyond the window, a canvas behind it, and one with self-conditioning."""
    config = model.config
    prompt = tokens((2, 2 * config.sliding_window + 3), config.vocab_size, seed)
    canvas = tokens((2, config.canvas_length), config.vocab_size, seed + 1)
    cache = model.new_cache(2)
    causal = model.encode(prompt, cache, logits=True)
    assert causal is not None
    # Given, not the first step's own: those differ by rounding, which a second pass multiplies.
    generator = torch.Generator().manual_seed(seed + 2)
    previous = 4 * torch.randn(2, config.canvas_length, config.vocab_size, generator=generator)
    return [torch.stack(causal), model.denoise(canvas, cache), model.denoise(canvas, cache, previous)]


def squares(parts: list[Tensor]) -> Tensor:
    """A loss that every logit of both modes moves."""
    return torch.stack([part.square().mean() for part in parts]).sum()


def through(plain: DiffusionGemma, weights: dict[str, Tensor], seed: int) -> list[Tensor]:
    """`logits` of the plain network with other weights."""

    class Call(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = plain

        def forward(self) -> list[Tensor]:
            return logits(self.net, seed)

    return torch.func.functional_call(Call(), {f"net.{name}": tensor for name, tensor in weights.items()}, ())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_is_unchanged_at_the_start(dtype: torch.dtype) -> None:
    model = network(0, dtype)
    before = logits(model, 0)
    added = add_lora(model, ALL)
    assert {p.dtype for p in added} == {dtype}
    for ours, theirs in zip(logits(model, 0), before, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_adapted_is_the_dense_sum_and_so_is_merged(seed: int) -> None:
    plain = network(seed)
    model = copy.deepcopy(plain)
    add_lora(model, ALL)
    randomise_adapters(model, seed)
    wanted = dense(plain, adapter_state(model), 5.0 / 3)
    oracle = through(plain, wanted, seed)
    assert max(distance(a, b) for a, b in zip(logits(plain, seed), oracle, strict=True)) > 0.05
    for ours, theirs in zip(logits(model, seed), oracle, strict=True):
        assert distance(ours, theirs) < 5e-4
    merge_lora(model)
    merged = model.state_dict()
    assert list(merged) == list(plain.state_dict())
    for name, tensor in wanted.items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-6, rtol=1e-5)
    for ours, theirs in zip(logits(model, seed), oracle, strict=True):
        assert distance(ours, theirs) < 5e-4


def test_windows_and_full_layers_are_both_among_the_seeds() -> None:
    kinds = {kind for seed in SEEDS for kind in random_config(random.Random(seed)).layer_types}
    assert kinds == {SLIDING, FULL}


@pytest.mark.parametrize("seed", [1, 4])
def test_gradients_are_those_of_the_dense_sum(seed: int) -> None:
    plain = network(seed).requires_grad_(False)
    model = copy.deepcopy(plain)
    added = add_lora(model, ALL)
    randomise_adapters(model, seed)
    squares(logits(model, seed)).backward()
    leaves = {name: t.clone().requires_grad_() for name, t in adapter_state(model).items()}
    oracle = torch.autograd.grad(squares(through(plain, dense(plain, leaves, 5.0 / 3), seed)), list(leaves.values()))
    assert len(oracle) == len(added)
    for parameter, theirs in zip(added, oracle, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, theirs, atol=2e-5 * float(theirs.abs().max()) + 1e-7, rtol=1e-3)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_merged_bfloat16_is_rounded_once() -> None:
    plain = network(2, torch.bfloat16)
    model = copy.deepcopy(plain)
    add_lora(model, ALL)
    randomise_adapters(model, 2)
    wide = {name: tensor.double() for name, tensor in adapter_state(model).items()}
    wanted = dense(copy.deepcopy(plain).double(), wide, 5.0 / 3)
    merge_lora(model)
    unequal = total = 0
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        unequal += int((tensor != wanted[name].bfloat16()).sum())
        total += tensor.numel()
    # A sum between two bfloat16 values may fall to either side in float32.
    assert unequal <= total / 1000


def test_only_the_chosen_parts_train() -> None:
    layers = r"layers\.[01]\."
    wanted = {
        "attention": layers + r"self_attn\.[qkvo]_proj\.weight",
        "mlp": layers + r"mlp\.(gate|up|down)_proj\.weight",
        "experts": layers + r"experts\.(gate_up|down)_proj",
        "self_conditioning": r"self_conditioning\.(gate|up|down)_proj\.weight",
        "router": layers + r"router\.proj\.weight",
    }
    tower = VisionConfig(12, 16, 1, 1, 12, 4, 4, False, False)
    config = replace(random_config(random.Random(0)), layer_types=(SLIDING, FULL), vision=tower)
    # The second layer is a full one: its values are its keys.
    counts = {"attention": 7, "mlp": 6, "experts": 4, "self_conditioning": 3, "router": 2}
    for part, pattern in wanted.items():
        model = DiffusionGemma(config)
        added = add_lora(model, Lora(4, 8.0, (part,)))
        names = [name.removesuffix(".A") for name in adapter_state(model) if name.endswith(".A")]
        assert len(names) == counts[part]
        assert all(re.fullmatch(pattern, name) for name in names)
        assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in added}
        assert len(added) == 2 * len(names)


def test_draws_depend_on_the_seed_alone_and_keep_their_bounds() -> None:
    states: list[Any] = []
    for seed in (7, 7, 8):
        model = network(3)
        add_lora(model, ALL, seed)
        states.append(adapter_state(model))
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name])
        if name.endswith(".A"):
            assert not torch.equal(tensor, states[2][name])
            bound = tensor.shape[-1] ** -0.5
            assert 0.6 * bound < tensor.abs().max() <= bound
        else:
            assert not tensor.any()


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="rank must be at least 1, not 0"):
        Lora(rank=0)
    with pytest.raises(ValueError, match=r"parts must be some of attention, .*, not vision"):
        Lora(parts=("attention", "vision"))
    with pytest.raises(ValueError, match="not none"):
        Lora(parts=())
    model = network(0)
    add_lora(model, Lora())
    with pytest.raises(ValueError, match="has an adapter already"):
        add_lora(model, Lora())
    merge_lora(model)
    add_lora(model, Lora())


def test_a_step_of_training_moves_the_output_and_not_the_base() -> None:
    model = network(5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prompt, canvas = tokens((1, 9), model.config.vocab_size, 0), tokens((1, 4), model.config.vocab_size, 1)
    start = our_logits(model, prompt, canvas)
    optimiser = torch.optim.SGD(add_lora(model, ALL), lr=0.1)
    squares(logits(model, 0)).backward()
    optimiser.step()
    assert not torch.equal(our_logits(model, prompt, canvas), start)
    kept = {re.sub(r"\.base\b", "", name): tensor for name, tensor in model.state_dict().items()}
    assert all(torch.equal(kept[name], tensor) for name, tensor in before.items())
