"""What lies between the products of a layer, each in one pass over memory, with gradients: Triton kernels.

The twins are in `model.layers`; `elementwise` chooses. All tensors are on one device, and whatever is not said to have
strides is contiguous. Importing this needs Triton.
"""

import torch
import triton  # type: ignore
import triton.language as tl  # type: ignore
from torch import Tensor

TILE = 2048
"""Elements that one program of a norm holds."""
BLOCK = 1024
SHARES = 512
"""Most programs of a norm's backward pass; each sums its rows' share of the weight's gradient."""


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """x [..., size] / rms(x) * weight in x's dtype, and 1 / rms(x), float32 [rows]."""
    rows, size, tile = _tiles(x)
    y, scale = torch.empty_like(x), torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        _rms_norm[(triton.cdiv(rows, tile["ROWS"]),)](x, weight, y, scale, rows, size, eps, **tile)
    return y, scale


def rms_norm_back(x: Tensor, gradient: Tensor, weight: Tensor | None, scale: Tensor) -> tuple[Tensor, Tensor | None]:
    """The gradients of x, in its dtype, and of the weight, float32 [size]."""
    rows, size, tile = _tiles(x)
    each = triton.cdiv(triton.cdiv(rows, tile["ROWS"]), SHARES)
    programs = triton.cdiv(rows, tile["ROWS"] * max(1, each))
    to_x = torch.empty_like(x)
    shares = None if weight is None else torch.empty(programs, size, dtype=torch.float32, device=x.device)
    if rows:
        _rms_norm_back[(programs,)](x, gradient, weight, scale, to_x, shares, rows, size, each, **tile)
    return to_x, None if shares is None else shares.sum(0)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """gelu_tanh(gate) * up of matrices whose rows may lie apart."""
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if y.numel():
        _gated[(triton.cdiv(y.numel(), BLOCK),)](*_rows(gate, up), y, y.numel(), gate.shape[-1], BLOCK)
    return y


def gated_back(gate: Tensor, up: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    to_gate, to_up = torch.empty_like(gradient), torch.empty_like(gradient)
    if gradient.numel():
        grid = (triton.cdiv(gradient.numel(), BLOCK),)
        _gated_back[grid](*_rows(gate, up), gradient, to_gate, to_up, gradient.numel(), gate.shape[-1], BLOCK)
    return to_gate, to_up


def rotate(x: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> Tensor:
    """Pairs (i, i + D/2) of x [N, heads, D] turned by the angles whose cos and sin are [N, 1, D/2]; or turned back."""
    y, half = torch.empty_like(x), x.shape[2] // 2
    if y.numel():
        _rotate[(triton.cdiv(y.numel() // 2, BLOCK),)](x, cos, sin, y, y.numel() // 2, x.shape[1], half, back, BLOCK)
    return y


def _tiles(x: Tensor) -> tuple[int, int, dict[str, int]]:
    size = x.shape[-1]
    columns = triton.next_power_of_2(size)
    return x.numel() // size, size, {"ROWS": max(1, TILE // columns), "COLUMNS": columns}


def _rows(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """A matrix's stride by row; what has more than two dimensions is contiguous."""
    apart, apart_up = (t.stride(0) if t.dim() == 2 else t.shape[-1] for t in (gate, up))
    return gate, up, apart, apart_up


@triton.jit
def _rms_norm(x, weight, y, scale, rows, size, eps, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore # noqa: N803
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < size)[None, :]
    at = row.to(tl.int64)[:, None] * size + column[None, :]
    values = tl.load(x + at, mask=inside, other=0).to(tl.float32)
    factor = 1 / tl.sqrt(tl.sum(values * values, 1) / size + eps)
    values *= factor[:, None]
    if weight is not None:
        values *= tl.load(weight + column, mask=column < size, other=0).to(tl.float32)[None, :]
    tl.store(y + at, values.to(y.dtype.element_ty), mask=inside)
    tl.store(scale + row, factor, mask=row < rows)


@triton.jit
def _rms_norm_back(  # type: ignore
    x,
    gradient,
    weight,
    scale,
    to_x,
    shares,
    rows,
    size,
    each,
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
):
    """With s = 1 / rms(x) and g the gradient times the weight: s g - x s^3 mean(g x), and the sum of gradient x s."""
    column = tl.arange(0, COLUMNS)
    real = column < size
    share = tl.zeros((COLUMNS,), tl.float32)
    for tile in range(each):
        row = (tl.program_id(0) * each + tile) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & real[None, :]
        at = row.to(tl.int64)[:, None] * size + column[None, :]
        normed = tl.load(x + at, mask=inside, other=0).to(tl.float32)
        wanted = tl.load(gradient + at, mask=inside, other=0).to(tl.float32)
        s = tl.load(scale + row, mask=row < rows, other=0)
        normed *= s[:, None]
        if weight is not None:
            share += tl.sum(wanted * normed, 0)
            wanted *= tl.load(weight + column, mask=real, other=0).to(tl.float32)[None, :]
        along = tl.sum(wanted * normed, 1) / size
        tl.store(to_x + at, ((wanted - normed * along[:, None]) * s[:, None]).to(to_x.dtype.element_ty), mask=inside)
    if weight is not None:
        tl.store(shares + tl.program_id(0) * size + column, share, mask=real)


@triton.jit
def _gated(gate, up, gate_stride, up_stride, y, count, size, BLOCK: tl.constexpr):  # type: ignore # noqa: N803
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    row, column = at // size, at % size
    g = tl.load(gate + row * gate_stride + column, mask=inside, other=0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=inside, other=0).to(tl.float32)
    tl.store(y + at, (g * _passed(g) * u).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _gated_back(  # type: ignore
    gate,
    up,
    gate_stride,
    up_stride,
    gradient,
    to_gate,
    to_up,
    count,
    size,
    BLOCK: tl.constexpr,  # noqa: N803
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    row, column = at // size, at % size
    g = tl.load(gate + row * gate_stride + column, mask=inside, other=0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=inside, other=0).to(tl.float32)
    wanted = tl.load(gradient + at, mask=inside, other=0).to(tl.float32)
    passed = _passed(g)
    slope = passed + g * passed * (1 - passed) * 1.5957691216057308 * (1 + 3 * 0.044715 * g * g)
    tl.store(to_gate + at, (wanted * u * slope).to(to_gate.dtype.element_ty), mask=inside)
    tl.store(to_up + at, (wanted * g * passed).to(to_up.dtype.element_ty), mask=inside)


@triton.jit
def _passed(g):  # type: ignore
    """What gelu_tanh lets through of g: (1 + tanh z) / 2 = sigmoid 2z, z = sqrt(2 / pi) (g + 0.044715 g^3)."""
    return tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))


@triton.jit
def _rotate(x, cos, sin, y, count, heads, half, back: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore # noqa: N803
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    pair, row = at % half, at // half
    angle = row // heads * half + pair
    first = row * 2 * half + pair
    a = tl.load(x + first, mask=inside, other=0).to(tl.float32)
    b = tl.load(x + first + half, mask=inside, other=0).to(tl.float32)
    c = tl.load(cos + angle, mask=inside, other=0).to(tl.float32)
    s = tl.load(sin + angle, mask=inside, other=0).to(tl.float32)
    s = -s if back else s
    tl.store(y + first, (a * c - b * s).to(y.dtype.element_ty), mask=inside)
    tl.store(y + first + half, (b * c + a * s).to(y.dtype.element_ty), mask=inside)
