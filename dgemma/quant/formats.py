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
E4M3_MAX, E2M1_MAX = 448.0, 6.0
E2M1_ENDS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""Where one e2m1 value ends and the next begins; ties go to the even code, so every second one belongs to the next."""


def e4m3(codes: Tensor) -> Tensor:
    """bfloat16 values of float8_e4m3fn codes (uint8); exact.

    A float8 shifted to where bfloat16 has its exponent is the same number times 2^-120, below the normal range too; on
    a CPU torch's own conversion takes ten times as long. The two NaNs become 480.
    """
    shifted = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(4)
    return shifted.bitwise_and_(-0x7810).view(torch.bfloat16).mul_(2.0**120)


def e2m1(pairs: Tensor) -> Tensor:
    """bfloat16 values [n, 2, m] of two 4-bit floats a byte, uint8 [n, m]: of the low nibbles, then of the high ones."""
    codes = halves(pairs << 4, pairs & 0xF0).view(torch.int8)
    shifted = codes.to(torch.int16).bitwise_left_shift_(2)
    return shifted.bitwise_and_(-0x7E40).view(torch.bfloat16).mul_(2.0**126)


def halves(low: Tensor, high: Tensor) -> Tensor:
    return torch.stack((low, high), dim=-2)


def scaled(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """values * scale, rounded once in the wider of the scale's dtype and `dtype`, then to `dtype`."""
    return values.to(torch.promote_types(scale.dtype, dtype)).mul_(scale).to(dtype)


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [n, in] and float32 scales [n, 1]: the largest of a row becomes ±127."""
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True).div_(127).clamp_(min=torch.finfo(torch.float32).tiny)
    return (wide / scale).round_().to(torch.int8), scale


class Float8(Packed):
    """e4m3 codes, a scale for each row."""

    kind = "fp8"

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
        return scaled(e4m3(codes), scale, self.dtype)

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
        return scaled(codes, scale, self.dtype)

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
        values = halves(codes & 15, codes >> 4).view(torch.int8).sub_(8)
        return scaled(values.unflatten(-1, (scale.shape[-1], -1)), scale[..., None, :, None], self.dtype).flatten(-3)

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


class Nvfp4(_Pairs):
    """e2m1 codes, an e4m3 scale for each 16 columns, a factor for each row, all of a matrix's alike.

    divide: files of compressed-tensors divide the scales by their factor, those of modelopt multiply.
    """

    kind = "nvfp4"

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, divide: bool = True, **parts: Tensor):
        super().__init__(shape, dtype, **parts)
        self.divide = divide

    def decode(self, codes: Tensor, scale: Tensor, factor: Tensor) -> Tensor:  # type: ignore[override]
        wide = e4m3(scale).float()
        wide = wide.div_(factor) if self.divide else wide.mul_(factor)
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


FORMATS: dict[str, type[Float8 | Int8 | Int4 | Nvfp4]] = {kind.kind: kind for kind in (Float8, Int8, Int4, Nvfp4)}
