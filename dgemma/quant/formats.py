"""The number formats of quantised checkpoints: float8, int8, int4 by groups, and NVFP4.

Sources: the compressed-tensors package (layouts, rounding) and NVIDIA's NVFP4 (e2m1 values in groups of 16, their
scales in e4m3, and a float32 factor for the matrix).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dgemma.quant.packed import Packed

GROUP = 16
"""Of NVFP4."""
ROWS = 2048
"""Rows of scales that are looked at at once, in the processor's cache."""
E4M3_MAX, E2M1_MAX = 448.0, 6.0
E2M1_ENDS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""Where one e2m1 value ends and the next begins; ties go to the even code, so every second one belongs to the next."""


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


def scaled(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 values, which are changed, times float32 scales, in `dtype`.

    A product of bfloat16 numbers is exact in float32: it is rounded once, as it is in bfloat16. Broadcast along the
    columns, torch multiplies float32 ten times as fast.
    """
    return values.mul_(scale).to(dtype)


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [n, in] and float32 scales [n, 1]: the largest of a row becomes ±127."""
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True).div_(127).clamp_(min=torch.finfo(torch.float32).tiny)
    return (wide / scale).round_().to(torch.int8), scale


class Float8(Packed):
    """e4m3 codes, a scale for each row."""

    kind = "fp8"

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
        return scaled(e4m3(codes), scale.float() * E4M3_UNIT, self.dtype)

    @classmethod
    def encode(cls, weight: Tensor, group: int) -> dict[str, Tensor]:
        scale = _scale(weight.abs().amax(-1, keepdim=True) / E4M3_MAX)
        codes = (weight / scale.float()).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        return {"codes": codes.view(torch.uint8), "scale": scale}


class Int8(Packed):
    """int8 codes, a scale for each row.

    activations: products round each row of x to int8 as well, if that is how the model is meant to run, and then use
    the processor's int8 dot products.
    """

    kind = "int8"

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, activations: bool = False, **parts: Tensor):
        super().__init__(shape, dtype, **parts)
        self.activations = activations

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
        return scaled(codes.float(), scale.float(), self.dtype)

    def multiply(self, x: Tensor, at: int | None = None) -> Tensor:
        if not self.activations or x.device.type != "cpu":
            return super().multiply(x, at)
        codes, scale = (part if at is None else part[at] for part in self.buffers())
        rounded, own = quantise_rows(x)
        return torch._int_mm(rounded, codes.t()).float().mul_(own).mul_(scale.t()).to(x.dtype)

    @classmethod
    def encode(cls, weight: Tensor, group: int) -> dict[str, Tensor]:
        scale = _scale(weight.abs().amax(-1, keepdim=True) / 127)
        return {"codes": (weight / scale.float()).round_().clamp_(-127, 127).to(torch.int8), "scale": scale}


class _Pairs(Packed):
    """Two 4-bit codes a byte, the even column's in the low nibble.

    Decoding gives all even columns and then all odd ones: nibbles that stay apart are a pass over bytes, and putting
    them side by side would take ten times as long. The activations are arranged instead.
    """

    def arrange(self, x: Tensor) -> Tensor:
        return torch.cat((x[..., 0::2], x[..., 1::2]), -1)

    def restore(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


class Int4(_Pairs):
    """Codes from -8 to 7, stored 8 higher; a scale for each group of columns. Parts: codes [out, in / 2], scale
    [out, in / group]."""

    kind = "int4"

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
        values = halves(codes & 15, codes >> 4).view(torch.int8).sub_(8).float()
        return scaled(
            values.unflatten(-1, (scale.shape[-1], -1)), scale.float()[..., None, :, None], self.dtype
        ).flatten(-3)

    @classmethod
    def encode(cls, weight: Tensor, group: int) -> dict[str, Tensor]:
        """Of a few scales, each group takes the one with the least squared error."""
        grouped = weight.float().unflatten(-1, (-1, group))
        top = grouped.abs().amax(-1, keepdim=True)
        best, chosen = torch.full_like(top, torch.inf), torch.zeros_like(top)
        for steps in (8.0, 7.5, 7.0, 6.5, 6.0):
            scale = _scale(top / steps).float()
            error = _codes4(grouped, scale).mul_(scale).sub_(grouped).square_().sum(-1, keepdim=True)
            better = error < best
            best, chosen = torch.where(better, error, best), torch.where(better, scale, chosen)
        codes = (_codes4(grouped, chosen) + 8).to(torch.uint8).flatten(-2)
        return {"codes": codes[..., 0::2] | codes[..., 1::2] << 4, "scale": chosen.squeeze(-1).bfloat16()}


def _codes4(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight / scale).round_().clamp_(-8, 7)


class W4A8(_Pairs):
    """Int4 whose scales are a row's unit times 1 to 15, so that a weight is an int8 times the unit; x is rounded to
    int8 as well, a row at a time, and a product is one of int8 numbers.

    Any reader of int4 by groups reads it: unit * multiple is exact in bfloat16. Parts: codes [out, in / 2], multiple
    uint8 [out, in / group], unit float32 [out, 1].
    """

    kind = "w4a8"

    def integers(self, codes: Tensor, multiple: Tensor) -> Tensor:
        """int8 [n, in], arranged."""
        values = halves(codes & 15, codes >> 4).view(torch.int8).sub_(8)
        half = values.shape[-1] // multiple.shape[-1]
        # Eight bytes at a time: torch repeats single ones ten times as slowly.
        spread = multiple.long().mul_(0x0101010101010101)[..., None].expand(*multiple.shape, half // 8).contiguous()
        return values.mul_(spread.view(torch.int8).view(*codes.shape[:-1], 1, -1)).flatten(-2)

    def decode(self, codes: Tensor, multiple: Tensor, unit: Tensor) -> Tensor:  # type: ignore[override]
        return scaled(self.integers(codes, multiple).float(), unit, self.dtype)

    def multiply(self, x: Tensor, at: int | None = None) -> Tensor:
        if x.device.type != "cpu":
            return super().multiply(x, at)
        codes, multiple, unit = (part if at is None else part[at] for part in self.buffers())
        rounded, own = quantise_rows(self.arrange(x))
        return torch._int_mm(rounded, self.integers(codes, multiple).t()).float().mul_(own).mul_(unit.t()).to(x.dtype)

    @classmethod
    def factors(cls, scale: Tensor) -> dict[str, Tensor] | None:
        """multiple and unit of a file's scales [..., out, in / group]; None if a row's are no such multiples."""
        rows = scale.view(-1, scale.shape[-1])
        units = [_row_unit(part.float()) for part in rows.split(ROWS)]
        unit = torch.cat(units).view(*scale.shape[:-1], 1)
        if not unit.all():
            return None
        return {"multiple": (scale / unit).round_().to(torch.uint8), "unit": unit}

    @classmethod
    def encode(cls, weight: Tensor, group: int) -> dict[str, Tensor]:
        """Of a few multiples, each group takes the one with the least squared error."""
        grouped = weight.float().unflatten(-1, (-1, group))
        top = grouped.abs().amax(-1, keepdim=True)
        unit = _few_bits(_scale(top.amax(-2, keepdim=True) / (7.0 * 15)).float())
        best, chosen = torch.full_like(top, torch.inf), torch.ones_like(top)
        for steps in (8.0, 7.5, 7.0, 6.5, 6.0):
            multiple = (top / (steps * unit)).round_().clamp_(1, 15)
            scale = multiple * unit
            error = _codes4(grouped, scale).mul_(scale).sub_(grouped).square_().sum(-1, keepdim=True)
            chosen, best = torch.where(error < best, multiple, chosen), error.minimum(best)
        scale = chosen * unit
        codes = (_codes4(grouped, scale) + 8).to(torch.uint8).flatten(-2)
        factors = cls.factors(scale.squeeze(-1))
        assert factors is not None
        return {"codes": codes[..., 0::2] | codes[..., 1::2] << 4, **factors}


def _row_unit(scale: Tensor) -> Tensor:
    """float32 [n, 1]: the largest number of which a row of scales [n, groups] are 1 to 15; 0 where there is none."""
    top = scale.amax(-1, keepdim=True)
    unit = torch.zeros_like(top)
    for count in range(15, 0, -1):
        tried = top / count
        whole = ((scale / tried).round_().mul_(tried) == scale).all(-1, keepdim=True)
        unit = torch.where(whole, tried, unit)
    return unit


def _few_bits(unit: Tensor) -> Tensor:
    """The next number up with four significant bits: times 15 it is a bfloat16 still."""
    fraction, exponent = torch.frexp(unit)
    return torch.ldexp((fraction * 16).ceil_(), exponent - 4)


class Nvfp4(_Pairs):
    """e2m1 codes, an e4m3 scale for each 16 columns, a factor for each row, all of a matrix's alike.

    divide: files of compressed-tensors divide the scales by their factor, those of modelopt multiply.
    """

    kind = "nvfp4"

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, divide: bool = True, **parts: Tensor):
        super().__init__(shape, dtype, **parts)
        self.divide = divide

    def decode(self, codes: Tensor, scale: Tensor, factor: Tensor) -> Tensor:  # type: ignore[override]
        wide = e4m3(scale).mul_(E4M3_UNIT)
        wide = (wide.div_(factor) if self.divide else wide.mul_(factor)).mul_(E2M1_UNIT)
        values = e2m1(codes).unflatten(-1, (wide.shape[-1], -1))
        return scaled(values, wide[..., None, :, None], self.dtype).flatten(-3)

    @classmethod
    def encode(cls, weight: Tensor, group: int) -> dict[str, Tensor]:
        """The factor brings the largest group's scale to the largest e4m3."""
        grouped = weight.float().unflatten(-1, (-1, GROUP))
        top = grouped.abs().amax(-1, keepdim=True)
        factor = E4M3_MAX * E2M1_MAX / top.amax(dim=(-3, -2, -1), keepdim=True).clamp(min=1e-30)
        scale = (top / E2M1_MAX * factor).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn)
        wide = scale.float() / factor
        values = torch.where(wide > 0, grouped / wide, 0)
        ends = values.new_tensor(E2M1_ENDS)
        ends[1::2] = ends[1::2].nextafter(ends.new_zeros(()))
        codes = torch.bucketize(values.abs(), ends).to(torch.uint8)
        codes = (codes | (values < 0).to(torch.uint8) << 3).flatten(-2)
        rows = factor.squeeze(-1).expand(*weight.shape[:-1], 1).contiguous()
        return {
            "codes": codes[..., 0::2] | codes[..., 1::2] << 4,
            "scale": scale.squeeze(-1).view(torch.uint8),
            "factor": rows,
        }


def _scale(scale: Tensor) -> Tensor:
    """In bfloat16, before codes are made with it: its rounding costs nothing. Rows of zeros get one to divide by."""
    return scale.float().clamp(min=2.0**-100).to(torch.bfloat16)


FORMATS: dict[str, type[Packed]] = {kind.kind: kind for kind in (Float8, Int8, Int4, W4A8, Nvfp4)}
