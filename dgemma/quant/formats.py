"""The number formats of quantised checkpoints: float8, int8, int4 by groups, and NVFP4.

Sources: the compressed-tensors package (layouts, rounding) and NVIDIA's NVFP4 (e2m1 values in groups of 16, their
scales in e4m3, and a float32 factor for the matrix).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dgemma.kernels import native
from dgemma.kernels.numbers import (
    E2M1_UNIT,
    E4M3_MAX,
    E4M3_UNIT,
    NVFP4_GROUP,
    SEARCHED,
    e2m1,
    e4m3,
    halves,
    least_error,
    packed_four_bits,
    pairs,
    scale_of,
    scaled,
)
from dgemma.quant.integers import W4A8, Int8, Pairs
from dgemma.quant.packed import Packed

E2M1_MAX = 6.0
E2M1_ENDS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""Where one e2m1 value ends and the next begins; ties go to the even code, so every second one belongs to the next."""


class Float8(Packed):
    """e4m3 codes, a scale for each row."""

    kind = "fp8"

    def stored(self, at: int | None) -> native.Stored:
        return native.Stored(self.kind, *self.parts(at))

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
        if native.fits(self.dtype, codes, scale):
            return native.fp8(codes, scale, self.dtype)
        return scaled(e4m3(codes), scale.float() * E4M3_UNIT, self.dtype)

    @classmethod
    def encode(cls, weight: Tensor, group: int) -> dict[str, Tensor]:
        scale = scale_of(weight.abs().amax(-1, keepdim=True) / E4M3_MAX)
        codes = (weight / scale.float()).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        return {"codes": codes.view(torch.uint8), "scale": scale}


class Int4(Pairs):
    """Codes from -8 to 7, stored 8 higher; a scale for each group of columns. Parts: codes [out, in / 2], scale
    [out, in / group]."""

    kind = "int4"

    def stored(self, at: int | None) -> native.Stored:
        return native.Stored(self.kind, *self.parts(at))

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
        if native.fits(self.dtype, codes, scale):
            return native.int4(codes, scale, self.dtype)
        values = halves(codes & 15, codes >> 4).view(torch.int8).sub_(8).float()
        return scaled(
            values.unflatten(-1, (scale.shape[-1], -1)), scale.float()[..., None, :, None], self.dtype
        ).flatten(-3)

    @classmethod
    def encode(cls, weight: Tensor, group: int) -> dict[str, Tensor]:
        """Of a few scales, each group takes the one with the least squared error."""
        grouped = weight.float().unflatten(-1, (-1, group))
        top = grouped.abs().amax(-1, keepdim=True)
        scale = least_error(grouped, (scale_of(top / steps).float() for steps in SEARCHED))
        return {"codes": packed_four_bits(grouped, scale), "scale": scale.squeeze(-1).bfloat16()}


class Nvfp4(Pairs):
    """e2m1 codes, an e4m3 scale for each 16 columns, a factor for each row, all of a matrix's alike.

    divide: files of compressed-tensors divide the scales by their factor, those of modelopt multiply.
    """

    kind = "nvfp4"

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, divide: bool = True, **parts: Tensor):
        super().__init__(shape, dtype, **parts)
        self.divide = divide

    def stored(self, at: int | None) -> native.Stored:
        return native.Stored("nvfp4 divided" if self.divide else self.kind, *self.parts(at))

    def decode(self, codes: Tensor, scale: Tensor, factor: Tensor) -> Tensor:  # type: ignore[override]
        if native.fits(self.dtype, codes, scale, factor):
            return native.nvfp4(codes, scale, factor, self.divide, self.dtype)
        wide = e4m3(scale).mul_(E4M3_UNIT)
        wide = (wide.div_(factor) if self.divide else wide.mul_(factor)).mul_(E2M1_UNIT)
        values = e2m1(codes).unflatten(-1, (wide.shape[-1], -1))
        return scaled(values, wide[..., None, :, None], self.dtype).flatten(-3)

    @classmethod
    def encode(cls, weight: Tensor, group: int) -> dict[str, Tensor]:
        """The factor brings the largest group's scale to the largest e4m3."""
        grouped = weight.float().unflatten(-1, (-1, NVFP4_GROUP))
        top = grouped.abs().amax(-1, keepdim=True)
        factor = E4M3_MAX * E2M1_MAX / top.amax(dim=(-3, -2, -1), keepdim=True).clamp(min=1e-30)
        scale = (top / E2M1_MAX * factor).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn)
        wide = scale.float() / factor
        values = torch.where(wide > 0, grouped / wide, 0)
        ends = values.new_tensor(E2M1_ENDS)
        ends[1::2] = ends[1::2].nextafter(ends.new_zeros(()))
        codes = torch.bucketize(values.abs(), ends).to(torch.uint8)
        codes = codes | (values < 0).to(torch.uint8) << 3
        rows = factor.squeeze(-1).expand(*weight.shape[:-1], 1).contiguous()
        return {
            "codes": pairs(codes.flatten(-2)),
            "scale": scale.squeeze(-1).view(torch.uint8),
            "factor": rows,
        }


FORMATS: dict[str, type[Packed]] = {kind.kind: kind for kind in (Float8, Int8, Int4, W4A8, Nvfp4)}
