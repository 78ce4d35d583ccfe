"""The product that goes through oneDNN: float32 to its rounding, and gradients where they are wanted."""

import pytest
import torch
from torch.profiler import profile

from dgemma.kernels import native
from dgemma.model.layers import ONEDNN, Linear, linear


def matrices(rows: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return tuple(torch.randn(n, 256, generator=generator).to(dtype) for n in (rows, 300))  # type: ignore[return-value]


@pytest.mark.parametrize("rows", [0, 1, 7, 64, 65])
def test_product_is_exact_to_float32_rounding(rows):
    x, weight = matrices(rows)
    exact = x.double() @ weight.double().T
    bound = 256 * 2**-24 * (x.double().abs() @ weight.double().abs().T)
    with torch.no_grad():
        assert torch.all((linear(x, weight).double() - exact).abs() <= bound)
        strided = x.T.contiguous().T
        assert torch.all((linear(strided, weight).double() - exact).abs() <= bound)
        assert linear(x[None], weight).shape == (1, rows, 300)


@pytest.mark.skipif(not ONEDNN, reason="this torch is built without oneDNN")
def test_only_large_float32_without_gradients_goes_through_onednn(monkeypatch):
    monkeypatch.setattr(native, "has_tiles", lambda: False)

    def used(dtype: torch.dtype, size: int) -> bool:
        x, weight = matrices(4, dtype)
        with profile() as profiled:
            linear(x, weight[:size])
        return any(event.key == "mkldnn::_linear_pointwise" for event in profiled.key_averages())

    with torch.no_grad():
        assert used(torch.float32, 300)
        assert not used(torch.bfloat16, 300)
        assert not used(torch.float32, 20)
    assert not used(torch.float32, 300)


def test_gradients_reach_input_and_weight():
    x, weight = matrices(3)
    layer = Linear(256, 300)
    layer.load_state_dict({"weight": weight})
    x.requires_grad_()
    layer(x).square().sum().backward()
    y = x.detach() @ weight.T
    torch.testing.assert_close(x.grad, 2 * y @ weight, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(layer.weight.grad, 2 * y.T @ x.detach(), rtol=1e-4, atol=1e-2)
