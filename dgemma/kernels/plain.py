"""Products of rows with quantised weights, each row with its own expert's: plain PyTorch.

Each function is the twin of the kernel of the same name in `grouped.py`: its test, and what runs without Triton. Both
round the same values at the same places, so they differ by the order of float32 sums only. Here the offsets are read on
the host.

Throughout, x is [N, K] in bfloat16, float16 or float32, its rows sorted by expert; expert e has the rows from
offsets[e] to offsets[e + 1], perhaps none; offsets is int32 or int64 [E + 1], from 0 to N. The result is [N, O] in x's
dtype. A plain linear is E = 1. Weights are stacked as the checkpoints store them, a row for each output. Shapes and
dtypes that do not fit are a ValueError.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dgemma.kernels.numbers import E4M3_MAX, NVFP4_GROUP, nibbles

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
INT4_GROUPS = (32, 64, 128)
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_E4M3 = (torch.uint8, torch.float8_e4m3fn)


def grouped_bf16(x: Tensor, offsets: Tensor, weight: Tensor) -> Tensor:
    """weight: [E, O, K] in x's dtype."""
    check_bf16(x, offsets, weight)
    return _each(x, offsets, weight.shape[1], lambda e: weight[e]).type_as(x)


def grouped_fp8(x: Tensor, offsets: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """W8A8: codes [E, O, K] of float8_e4m3fn, or their bytes; scale [E, O, 1]. x is rounded by `quantise_rows`."""
    check_fp8(x, offsets, codes, scale)
    rounded, row_scale = quantise_rows(x)
    weight, factor = codes.view(torch.float8_e4m3fn), scale.float().mT
    y = _each(rounded, offsets, codes.shape[1], lambda e: weight[e], lambda e: factor[e])
    return (y * row_scale).type_as(x)


def grouped_int4(x: Tensor, offsets: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """W4A16: codes uint8 [E, O, K / 2], the even column in the low nibble, 8 being zero; scale [E, O, K / group].

    Weights are rounded to x's dtype before they are multiplied. The group is 32, 64 or 128.
    """
    group = check_int4(x, offsets, codes, scale)

    def weight(e: int) -> Tensor:
        return ((nibbles(codes[e]).float() - 8) * scale[e].float().repeat_interleave(group, -1)).type_as(x)

    return _each(x, offsets, codes.shape[1], weight).type_as(x)


def grouped_nvfp4(
    x: Tensor, offsets: Tensor, codes: Tensor, scale: Tensor, global_scale: Tensor, divide: bool = False
) -> Tensor:
    """W4A16: codes uint8 [E, O, K / 2] of e2m1, the even column in the low nibble; scale [E, O, K / 16] of e4m3.

    global_scale: float32 [E, O, 1], which multiplies the scale (modelopt) or divides it (compressed-tensors). Being
    constant along a row it is applied to the sum, so that a weight, code * scale, is exact in 16 bits.
    """
    check_nvfp4(x, offsets, codes, scale, global_scale)
    levels = torch.tensor(E2M1, device=x.device)
    factor = (global_scale.reciprocal() if divide else global_scale).mT

    def weight(e: int) -> Tensor:
        scales = scale[e].view(torch.float8_e4m3fn).float().repeat_interleave(NVFP4_GROUP, -1)
        return levels[nibbles(codes[e]).long()] * scales

    return _each(x, offsets, codes.shape[1], weight, lambda e: factor[e]).type_as(x)


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [N, K] as float8_e4m3fn and what to multiply each row with, float32 [N, 1]: its greatest magnitude / 448."""
    x = x.float()
    scale = (x.abs().amax(-1, keepdim=True) / E4M3_MAX).clamp(min=torch.finfo(torch.float32).tiny)
    return (x / scale).to(torch.float8_e4m3fn), scale


def check_bf16(x: Tensor, offsets: Tensor, weight: Tensor) -> None:
    _check(x, offsets, weight, 1, (x.dtype,))


def check_fp8(x: Tensor, offsets: Tensor, codes: Tensor, scale: Tensor) -> None:
    _check(x, offsets, codes, 1, _E4M3)
    _fits("scale", scale, (*codes.shape[:2], 1), _FLOATS)


def check_int4(x: Tensor, offsets: Tensor, codes: Tensor, scale: Tensor) -> int:
    """The columns that share a scale."""
    _check(x, offsets, codes, 2, (torch.uint8,))
    groups = {x.shape[1] / group: group for group in INT4_GROUPS}
    if scale.shape[-1] not in groups:
        raise ValueError(f"scale has {scale.shape[-1]} groups for {x.shape[1]} columns; groups are of 32, 64 or 128")
    _fits("scale", scale, (*codes.shape[:2], scale.shape[-1]), _FLOATS)
    return groups[scale.shape[-1]]


def check_nvfp4(x: Tensor, offsets: Tensor, codes: Tensor, scale: Tensor, global_scale: Tensor) -> None:
    _check(x, offsets, codes, 2, (torch.uint8,))
    if x.shape[1] % NVFP4_GROUP:
        raise ValueError(f"x has {x.shape[1]} columns, which is no multiple of {NVFP4_GROUP}")
    _fits("scale", scale, (*codes.shape[:2], x.shape[1] // NVFP4_GROUP), _E4M3)
    _fits("global_scale", global_scale, (*codes.shape[:2], 1), (torch.float32,))


def _check(x: Tensor, offsets: Tensor, weight: Tensor, packed: int, dtypes: Sequence[torch.dtype]) -> None:
    """packed: columns in an element of the weight."""
    if x.ndim != 2 or weight.ndim != 3:
        raise ValueError(f"x is {list(x.shape)} and the weight {list(weight.shape)}, not [N, K] and [E, O, …]")
    _fits("x", x, (len(x), weight.shape[-1] * packed), _FLOATS)
    _fits("weight", weight, tuple(weight.shape), dtypes)
    _fits("offsets", offsets, (len(weight) + 1,), (torch.int32, torch.int64))


def _fits(name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: Sequence[torch.dtype]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} is {list(tensor.shape)}, not {list(shape)}")
    if tensor.dtype not in dtypes:
        known = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} is {str(tensor.dtype).removeprefix('torch.')}, not {known}")


def _each(
    x: Tensor,
    offsets: Tensor,
    outputs: int,
    weight: Callable[[int], Tensor],
    factor: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """Every expert's rows times its weight [O, K], and its outputs times its factor [1, O]; float32 [N, O]."""
    products = [x.new_empty(0, outputs, dtype=torch.float32)]
    for e, rows in enumerate(x.split(offsets.diff().tolist())):
        if len(rows):
            y = rows.float() @ weight(e).float().mT
            products.append(y if factor is None else y * factor(e))
    return torch.cat(products)
