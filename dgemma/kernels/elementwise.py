"""What lies between the products of a layer, on a CPU; the twins are in `model.layers` and `model.experts`.

Norm and gate have gradients; rotation and the sum of experts are for inference.
"""

from typing import Any

import torch
from torch import Tensor

from dgemma.kernels import native

CHUNK = 64
"""Rows whose share of a weight's gradient is added up first, in elementwise.c."""


def fits_norm(x: Tensor, weight: Tensor | None) -> bool:
    return native.fits(x.dtype, x) and x.dtype != torch.int8 and (weight is None or weight.is_contiguous())


def fits_gate(gate: Tensor, up: Tensor) -> bool:
    if gate.dtype != up.dtype or not native.fits(gate.dtype):
        return False
    return all(
        x.device.type == "cpu" and (x.is_contiguous() or (x.dim() == 2 and x.stride(1) == 1)) for x in (gate, up)
    )


def fits_inference(*tensors: Tensor) -> bool:
    """Tensors of one dtype that nobody wants a gradient of."""
    learning = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return not learning and native.fits(tensors[0].dtype, *tensors) and len({x.dtype for x in tensors}) == 1


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / rms(x) * weight over the last axis, in x's dtype."""
    needed = torch.is_grad_enabled() and (x.requires_grad or (weight is not None and weight.requires_grad))
    return _Norm.apply(x, weight, eps) if needed else _normed(x, weight, eps)[0]


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """gelu_tanh(gate) * up."""
    needed = torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad)
    return _Gate.apply(gate, up) if needed else _gated(gate, up)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (i, i + D/2) of x [N, heads, D] turned by the angles whose cos and sin are [N, 1, D/2]."""
    y = torch.empty_like(x)
    native.call("rotate", x, cos, sin, x.dtype, y, *x.shape[:2], x.shape[2] // 2)
    return y


def weighted_sums(y: Tensor, weights: Tensor, places: Tensor) -> Tensor:
    """[N, hidden] of the rows of y [N * k, hidden] at places [N, k] times float32 weights [N, k]."""
    out = y.new_empty(len(weights), y.shape[-1])
    native.call("weighted_sums", y, weights, places.contiguous(), y.dtype, out, *weights.shape, y.shape[-1])
    return out


def _normed(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    rows, size = x[..., 0].numel(), x.shape[-1]
    y, scale = torch.empty_like(x), torch.empty(rows)
    native.call("rms_norm", x, x.dtype, _wide(weight), torch.tensor([eps]), y, scale, rows, size)
    return y, scale


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    y = torch.empty(gate.shape, dtype=gate.dtype)
    rows, size = y[..., 0].numel(), y.shape[-1]
    native.call("gated", gate, up, y.dtype, gate.stride(-2), up.stride(-2), y, rows, size)
    return y


def _wide(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.detach().float()


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        y, scale = _normed(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        rows, size = len(scale), x.shape[-1]
        to_x = torch.empty_like(x)
        shares = None if weight is None else torch.zeros(-(-rows // CHUNK), size)
        wide, gradient = _wide(weight), gradient.contiguous()
        native.call("rms_norm_back", x, gradient, x.dtype, wide, scale, to_x, shares, rows, size)
        return to_x, None if shares is None else shares.sum(0).to(weight.dtype), None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _gated(gate, up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        to_gate, to_up = (torch.empty(gate.shape, dtype=gate.dtype) for _ in range(2))
        strides, shape = (gate.stride(-2), up.stride(-2)), (to_up[..., 0].numel(), to_up.shape[-1])
        native.call("gated_back", gate, up, gradient.contiguous(), gate.dtype, *strides, to_gate, to_up, *shape)
        return to_gate, to_up
