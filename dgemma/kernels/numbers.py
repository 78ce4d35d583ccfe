"""Four- and eight-bit numbers as tensors hold them, and scales."""

from collections.abc import Iterable

import torch
from torch import Tensor

from dgemma.kernels import native

E4M3_MAX = 448.0
NVFP4_GROUP = 16
"""Columns that share a scale."""


def e4m3(codes: Tensor) -> Tensor:
    """float32 values, times 2^-8, of float8_e4m3fn codes (uint8); exact. The two NaNs become 480.

    Shifted to where float16 has its exponent a float8 is the same number times 2^-8, below the normal range too; on a
    CPU torch's own conversion takes ten times as long.
    """
    shifted = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7)
    return shifted.bitwise_and_(-0x4080).view(torch.float16).float()


def e2m1(pairs: Tensor) -> Tensor:
    """float32 values, times 2^-14, [n, 2, m] of two 4-bit floats a byte, uint8 [n, m]: the low nibbles', then the high
    ones'. As `e4m3`."""
    codes = halves(pairs << 4, pairs & 0xF0).view(torch.int8)
    return codes.to(torch.int16).bitwise_left_shift_(5).bitwise_and_(-0x7200).view(torch.float16).float()


E4M3_UNIT, E2M1_UNIT = 2.0**8, 2.0**14


def halves(low: Tensor, high: Tensor) -> Tensor:
    return torch.stack((low, high), dim=-2)


def nibbles(codes: Tensor) -> Tensor:
    """Bytes [..., n] as values from 0 to 15, [..., 2 * n], the low one of each first."""
    return torch.stack((codes & 15, codes >> 4), -1).flatten(-2)


def pairs(values: Tensor) -> Tensor:
    """Undoes `nibbles`."""
    return values[..., 0::2] | values[..., 1::2] << 4


def scaled(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 values, which are changed, times float32 scales, in `dtype`.

    A product of bfloat16 numbers is exact in float32: it is rounded once, as it is in bfloat16. Broadcast along the
    columns, torch multiplies float32 ten times as fast.
    """
    return values.mul_(scale).to(dtype)


def scale_of(scale: Tensor) -> Tensor:
    """In bfloat16, before codes are made with it: its rounding costs nothing. Rows of zeros get one to divide by."""
    return scale.float().clamp(min=2.0**-100).to(torch.bfloat16)


SEARCHED = (8.0, 7.5, 7.0, 6.5, 6.0)
"""Steps to a group's largest weight that are tried for its scale: what lies beyond -8 and 7 is cut off."""


def four_bits(weight: Tensor, scale: Tensor) -> Tensor:
    """Whole numbers from -8 to 7."""
    return (weight / scale).round_().clamp_(-8, 7)


def least_error(weight: Tensor, scales: Iterable[Tensor]) -> Tensor:
    """Of scales [..., 1] for groups of four-bit weights [..., g] the one with each group's least squared error."""
    least = chosen = None
    for scale in scales:
        error = four_bits(weight, scale).mul_(scale).sub_(weight).square_().sum(-1, keepdim=True)
        if least is None or chosen is None:
            least, chosen = error, scale
        else:
            chosen, least = torch.where(error < least, scale, chosen), error.minimum(least)
    assert chosen is not None
    return chosen


def packed_four_bits(weight: Tensor, scale: Tensor) -> Tensor:
    """Groups [..., G, g] over their scales [..., G, 1] as bytes [..., G * g / 2], each code stored 8 higher."""
    return pairs((four_bits(weight, scale) + 8).to(torch.uint8).flatten(-2))


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [n, in] and float32 scales [n, 1]: the largest of a row becomes ±127."""
    if native.fits(x.dtype, x):
        return native.quantise_rows(x)
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True).div_(127).clamp_(min=torch.finfo(torch.float32).tiny)
    return (wide * scale.reciprocal()).round_().to(torch.int8), scale
