"""What lies between the products of a layer, in C on a CPU and in Triton on a GPU, each where it is at hand.

The twins are in `model`. Norm and gate have gradients, and on a GPU rotation too; else
rotation, softmax and the sum of experts are for inference.
"""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from dgemma.kernels import native

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
CHUNK = 64
"""Rows whose share of a weight's gradient is added up first, in elementwise.c."""


@cache
def triton() -> Any:
    """The Triton kernels; None where Triton is not installed."""
    return import_module("dgemma.kernels.fused") if find_spec("triton") else None


def fits_norm(x: Tensor, weight: Tensor | None) -> bool:
    if weight is not None and not weight.is_contiguous():
        return False
    return _fits_triton(x) if x.is_cuda else native.fits(x.dtype, x) and x.dtype != torch.int8


def fits_gate(gate: Tensor, up: Tensor) -> bool:
    if gate.dtype != up.dtype or gate.device != up.device:
        return False
    if not all(x.is_contiguous() or (x.dim() == 2 and x.stride(1) == 1) for x in (gate, up)):
        return False
    return _fits_triton(gate[:0]) if gate.is_cuda else gate.device.type == "cpu" and native.fits(gate.dtype)


def fits_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    if x.dim() != 3:  # the image tower turns two parts of a head apart
        return False
    return _fits_triton(x, cos, sin) if x.is_cuda else fits_inference(x, cos, sin)


def _fits_triton(*tensors: Tensor) -> bool:
    usable = all(x.is_cuda and x.is_contiguous() and x.dtype in FLOATS for x in tensors)
    return usable and triton() is not None


def fits_inference(*tensors: Tensor) -> bool:
    """Tensors of one dtype that nobody wants a gradient of."""
    return not _learning(*tensors) and native.fits(tensors[0].dtype, *tensors) and len({x.dtype for x in tensors}) == 1


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / rms(x) * weight over the last axis, in x's dtype."""
    learning = _learning(x) if weight is None else _learning(x, weight)
    return _Norm.apply(x, weight, eps) if learning else _normed(x, weight, eps)[0]


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """gelu_tanh(gate) * up."""
    return _Gate.apply(gate, up) if _learning(gate, up) else _gated(gate, up)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (i, i + D/2) of x [N, heads, D] turned by the angles whose cos and sin are [N, 1, D/2]."""
    if x.is_cuda:
        return _Rotation.apply(x, cos, sin) if _learning(x) else triton().rotate(x, cos, sin)
    y = torch.empty_like(x)
    native.call("rotate", x, cos, sin, x.dtype, y, *x.shape[:2], x.shape[2] // 2)
    return y


def softmax_(x: Tensor) -> Tensor:
    """Over the last axis of float32 x, in its place.

    Exponentials that are no normal numbers become 0: on many processors each of them takes a hundred times longer.
    """
    native.call("softmax", x, x[..., 0].numel(), x.shape[-1])
    return x


def weighted_sums(y: Tensor, weights: Tensor, places: Tensor) -> Tensor:
    """[N, hidden] of the rows of y [N * k, hidden] at places [N, k] times float32 weights [N, k]."""
    out = y.new_empty(len(weights), y.shape[-1])
    native.call("weighted_sums", y, weights, places.contiguous(), y.dtype, out, *weights.shape, y.shape[-1])
    return out


def _learning(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _normed(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    if x.is_cuda:
        return triton().rms_norm(x, weight, eps)
    rows, size = x[..., 0].numel(), x.shape[-1]
    y, scale = torch.empty_like(x), torch.empty(rows)
    native.call("rms_norm", x, x.dtype, _wide(weight), torch.tensor([eps]), y, scale, rows, size)
    return y, scale


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    if gate.is_cuda:
        return triton().gated(gate, up)
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
        if x.is_cuda:
            to_x, share = triton().rms_norm_back(x, gradient.contiguous(), weight, scale)
            return to_x, None if share is None else share.to(weight.dtype), None
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
        if gate.is_cuda:
            return triton().gated_back(gate, up, gradient.contiguous())
        to_gate, to_up = (torch.empty(gate.shape, dtype=gate.dtype) for _ in range(2))
        strides, shape = (gate.stride(-2), up.stride(-2)), (to_up[..., 0].numel(), to_up.shape[-1])
        native.call("gated_back", gate, up, gradient.contiguous(), gate.dtype, *strides, to_gate, to_up, *shape)
        return to_gate, to_up


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return triton().rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return triton().rotate(gradient.contiguous(), *ctx.saved_tensors, back=True), None, None
