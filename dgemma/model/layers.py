"""The plain parts of a layer: RMS norm, rotary positions, the gated MLP."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgemma.config import Rope
from dgemma.kernels import elementwise, native

ONEDNN = torch.backends.mkldnn.is_available()
ONEDNN_SIZE = 1 << 16
"""Elements of a matrix from which oneDNN's rate pays for its slower call."""


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T.

    Where there are tile registers, by the functions of `kernels`, which leave the weights as they lie; small float32
    matrices on other processors too. For large ones torch asks MKL there, which on some AMD processors reaches half
    the rate of oneDNN; so this asks oneDNN, which computes in float32 too, and whose operation has no gradient.
    """
    small = weight.numel() < ONEDNN_SIZE
    if (small or native.has_tiles()) and native.fits_grouped(x, weight):
        rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
        return native.grouped(rows, torch.tensor([0, len(rows)]), weight).view(*x.shape[:-1], len(weight))
    wanted = ONEDNN and not small and not torch.is_grad_enabled()
    if wanted and x.is_cpu and x.dtype == weight.dtype == torch.float32:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return F.linear(x, weight)


class Linear(nn.Linear):
    """A matrix without bias."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, computed in float32; `scale=False` leaves the weight out."""

    def __init__(self, size: int, eps: float, scale: bool = True):
        super().__init__()
        self.size, self.eps = size, eps
        self.weight = nn.Parameter(torch.ones(size)) if scale else None

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if elementwise.fits_norm(x, weight):
        return elementwise.rms_norm(x, weight, eps)
    wide = x.float()
    y = wide * wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (y if weight is None else y.mul_(weight)).type_as(x)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """gelu_tanh(gate) * up."""
    if elementwise.fits_gate(gate, up):
        return elementwise.gated(gate, up)
    return F.gelu(gate, approximate="tanh") * up


def inverse_frequencies(rope: Rope, head_size: int, device: torch.device) -> Tensor:
    """float32 [head_size / 2], turns in radians a position.

    "proportional" turns only the first `partial` share of the pairs, at the frequencies they would have among all.
    """
    pairs = head_size // 2
    turning = pairs if rope.type == "default" else int(rope.partial * head_size // 2)
    exponents = torch.arange(turning, dtype=torch.float32, device=device) * 2 / head_size
    return F.pad(1.0 / rope.theta**exponents, (0, pairs - turning))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns pairs (i, i + D/2) of x [N, heads, D] by the angles whose cos and sin [N, 1, D/2] are given."""
    if elementwise.fits_rotation(x, cos, sin):
        return elementwise.rotate(x, cos, sin)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class MLP(nn.Module):
    """down(gelu_tanh(gate x) * up x)."""

    def __init__(self, size: int, inner: int):
        super().__init__()
        self.gate_proj = Linear(size, inner)
        self.up_proj = Linear(size, inner)
        self.down_proj = Linear(inner, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))
