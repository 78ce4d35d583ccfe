"""Where CUDA would use kernels, their plain twins stand in: the network must be the same as without them."""

import pytest
import torch

import dgemma
from dgemma.kernels import plain
from dgemma.quant import grouped, modules


@pytest.fixture
def on_kernels(monkeypatch):
    """Counts what goes through the kernels' twins."""
    calls = []
    twins = type("Twins", (), {})()
    for name in ("grouped_fp8", "grouped_int4", "grouped_nvfp4"):
        twin = getattr(plain, name)
        setattr(twins, name, lambda *a, twin=twin, **k: (calls.append(twin), twin(*a, **k))[1])

    def use():
        monkeypatch.setattr(grouped, "kernels", lambda: twins)
        monkeypatch.setattr(modules, "fits", lambda x, *matrices: True)
        return calls

    return use


@pytest.mark.parametrize(("kind", "bound"), [("int4", 1e-5), ("nvfp4", 1e-5), ("fp8", 0.05)])
@torch.inference_mode()
def test_network_on_kernels(kind, bound, on_kernels):
    """fp8 rounds the activations too there, hence its bound."""
    model = dgemma.load("tiny", quantize=kind).model
    canvas = torch.arange(96)[None] % 900

    def run():
        cache = model.new_cache()
        model.encode(torch.arange(40)[None], cache)
        return model.denoise(canvas, cache)

    plainly = run()
    calls = on_kernels()
    fused = run()
    # Two passes: the causal one skips all but the keys and values of the last layer.
    full = len(model.layers) * (2 + 7) - model.layers[-1].self_attn.k_proj.weight.shape.numel() * 0
    assert len(calls) > full
    error = (fused - plainly).square().mean().sqrt() / plainly.square().mean().sqrt()
    assert error < bound
