"""Where CUDA would use kernels, their plain twins stand in: the network must be the same as without them."""

import pytest
import torch

import dgemma
from dgemma.kernels import plain
from dgemma.quant import grouped, modules
from dgemma.quant.formats import Float8, Int4, Nvfp4


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
        monkeypatch.setattr(modules, "fits", lambda x, *ms: all(isinstance(m, Float8 | Int4 | Nvfp4) for m in ms))
        return calls

    return use


@pytest.mark.parametrize(
    ("kind", "used", "bound"),
    [
        ("int4", {"grouped_int4"}, 1e-5),
        ("nvfp4", {"grouped_nvfp4", "grouped_fp8"}, 0.05),
        ("fp8", {"grouped_fp8"}, 0.05),
    ],
)
@torch.inference_mode()
def test_network_on_kernels(kind, used, bound, on_kernels):
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
    assert {twin.__name__ for twin in calls} == used
    assert len(calls) >= 2 * 2 * (len(model.layers) - 1)  # both stacks of every layer, but for the last one's in encode
    error = (fused - plainly).square().mean().sqrt() / plainly.square().mean().sqrt()
    assert error < bound
