"""Formats whose products are of int8 numbers: int8, and int4 with scales that allow it.

Each row of x is rounded to int8 as well, and the processor's int8 dot products do the rest: twice the rate of bfloat16.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from dgemma.kernels import native
from dgemma.kernels.numbers import (
    SEARCHED,
    halves,
    least_error,
    nibbles,
    packed_four_bits,
    pairs,
    quantise_rows,
    scale_of,
    scaled,
)
from dgemma.quant.packed import Packed

ROWS = 2048
"""Rows of scales that are looked at at once, in the processor's cache."""


@cache
def sums_are_exact() -> bool:
    """Whether this processor adds products of int8 numbers in 32 bits: older ones cut pairs of them off at 16."""
    most = torch.full((32, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(most, -most.t()) == -64 * 127 * 127).all())


def int_product(x: Tensor, y: Tensor) -> Tensor:
    """float32 [n, m] of int8 [n, k] and [k, m]."""
    return torch._int_mm(x, y).float() if sums_are_exact() else x.float() @ y.float()


class Integers(Packed):
    """Rows of int8 numbers, each row times a unit. activations: whether products round x too; they do so on a CPU."""

    activations = True

    def integers(self, at: int | None) -> tuple[Tensor, Tensor]:
        """The matrix, or one of the stack: int8 [out, in], arranged, and the rows' units [out, 1]."""
        raise NotImplementedError

    def multiply(self, x: Tensor, at: int | None = None) -> Tensor:
        if not self.activations or x.device.type != "cpu":
            return super().multiply(x, at)
        rounded, own = quantise_rows(x)
        if native.fits(x.dtype, *self.buffers()) and native.has_tiles():
            stack = [part[None] for part in self.parts(at)]
            return native.grouped_int8(self.arrange(rounded), own, torch.tensor([len(x)]), x.dtype, *stack)
        return self._multiply(self.arrange(rounded), own, at).to(x.dtype)

    def grouped(self, x: Tensor, counts: Tensor) -> Tensor:
        learning = torch.is_grad_enabled() and x.requires_grad
        if not self.activations or x.device.type != "cpu" or learning:
            return super().grouped(x, counts)
        rounded, own = quantise_rows(x)
        if native.fits(x.dtype, *self.buffers()) and native.has_dot_products():
            return native.grouped_int8(self.arrange(rounded), own, counts, x.dtype, *self.buffers())
        sizes = counts.tolist()
        y = x.new_empty(len(x), self.shape[-2])
        parts = zip(self.arrange(rounded).split(sizes), own.split(sizes), y.split(sizes), strict=True)
        for expert, (rows, scale, out) in enumerate(parts):
            if len(rows):
                out.copy_(self._multiply(rows, scale, expert))
        return y

    def _multiply(self, rounded: Tensor, own: Tensor, at: int | None) -> Tensor:
        """float32 [n, out] of int8 [n, in] and its rows' scales."""
        integers, unit = self.integers(at)
        return int_product(rounded, integers.t()).mul_(own).mul_(unit.t())


class Int8(Integers):
    """int8 codes, a scale for each row."""

    kind = "int8"

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, activations: bool = False, **parts: Tensor):
        super().__init__(shape, dtype, **parts)
        self.activations = activations

    def stored(self, at: int | None) -> native.Stored:
        return native.Stored(self.kind, *self.parts(at))

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
        return scaled(codes.float(), scale.float(), self.dtype)

    def integers(self, at: int | None) -> tuple[Tensor, Tensor]:
        codes, scale = self.parts(at)
        return codes, scale

    @classmethod
    def encode(cls, weight: Tensor, group: int) -> dict[str, Tensor]:
        scale = scale_of(weight.abs().amax(-1, keepdim=True) / 127)
        return {"codes": (weight / scale.float()).round_().clamp_(-127, 127).to(torch.int8), "scale": scale}


class Pairs(Packed):
    """Two 4-bit codes a byte, the even column's in the low nibble.

    Decoding gives all even columns and then all odd ones: nibbles that stay apart are a pass over bytes, and putting
    them side by side would take ten times as long. The activations are arranged instead.
    """

    def arrange(self, x: Tensor) -> Tensor:
        return torch.cat((x[..., 0::2], x[..., 1::2]), -1)

    def restore(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


class W4A8(Integers):
    """Int4 whose scales are a row's unit times 1 to 15, so that a weight is an int8 times the unit.

    In a file it is int4 by groups, which any reader reads: unit * multiple is exact in bfloat16. In memory a byte holds
    columns 8 apart, so that eight codes are a word, and the first words of all groups lie before the second ones: what
    multiplies them is then a copy of words too. Parts: codes uint8 [out, in / 2], multiple uint8 [out, in / group],
    units float32 [out, 1].
    """

    kind = "w4a8"

    def arrange(self, x: Tensor) -> Tensor:
        groups = self.get_buffer("multiple").shape[-1]
        if x.dtype == torch.int8:
            words = x.contiguous().view(torch.int64).unflatten(-1, (groups, -1, 2))
            return words.movedim((-1, -3), (-3, -1)).flatten(-3).view(torch.int8)
        return x.unflatten(-1, (groups, -1, 2, 8)).movedim((-2, -4), (-4, -2)).flatten(-4)

    def restore(self, x: Tensor) -> Tensor:
        groups = self.get_buffer("multiple").shape[-1]
        return x.unflatten(-1, (2, -1, groups, 8)).movedim((-4, -2), (-2, -4)).flatten(-4)

    def decode(self, codes: Tensor, multiple: Tensor, units: Tensor) -> Tensor:  # type: ignore[override]
        return scaled(_integers(codes, multiple).float(), units, self.dtype)

    def integers(self, at: int | None) -> tuple[Tensor, Tensor]:
        codes, multiple, units = self.parts(at)
        return _integers(codes, multiple), units

    @classmethod
    def of_int4(cls, codes: Tensor, scale: Tensor) -> dict[str, Tensor] | None:
        """The parts, of those of `Int4`; None if the scales of a row are not 1 to 15 times a number."""
        unit = torch.cat([_row_unit(part.float()) for part in scale.view(-1, scale.shape[-1]).split(ROWS)])
        if not unit.all():
            return None
        unit = unit.view(*scale.shape[:-1], 1)
        multiple = (scale / unit).round_().to(torch.uint8)
        return {"codes": _to_words(codes, scale.shape[-1]), "multiple": multiple, "units": unit}

    @classmethod
    def to_int4(cls, codes: Tensor, multiple: Tensor, units: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and bfloat16 scales as `Int4` has them."""
        return _from_words(codes, multiple.shape[-1]), (units * multiple).bfloat16()

    @classmethod
    def encode(cls, weight: Tensor, group: int) -> dict[str, Tensor]:
        """Of a few multiples, each group takes the one with the least squared error."""
        grouped = weight.float().unflatten(-1, (-1, group))
        top = grouped.abs().amax(-1, keepdim=True)
        unit = _few_bits(scale_of(top.amax(-2, keepdim=True) / (7.0 * 15)).float())
        multiples = ((top / (steps * unit)).round_().clamp_(1, 15) for steps in SEARCHED)
        scale = least_error(grouped, (multiple * unit for multiple in multiples))
        parts = cls.of_int4(packed_four_bits(grouped, scale), scale.squeeze(-1))
        assert parts is not None
        return parts


def _integers(codes: Tensor, multiple: Tensor) -> Tensor:
    """int8 [n, in], arranged."""
    if native.fits(torch.int8, codes, multiple):
        return native.w4a8(codes, multiple)
    out = torch.empty(*codes.shape[:-1], 2, codes.shape[-1], dtype=torch.uint8, device=codes.device)
    torch.bitwise_and(codes, 15, out=out[..., 0, :])
    torch.bitwise_right_shift(codes, 4, out=out[..., 1, :])
    # A multiple eight times over is a word, and a group has as many words as it has sixteens of columns.
    word = multiple.long().mul_(0x0101010101010101)
    spread = torch.cat([word] * (codes.shape[-1] // (8 * word.shape[-1])), -1).view(torch.int8)
    return out.view(torch.int8).sub_(8).mul_(spread[..., None, :]).flatten(-2)


def _to_words(codes: Tensor, groups: int) -> Tensor:
    """Bytes of columns side by side [..., n] as W4A8 has them."""
    if native.fits(torch.int8, codes):
        return native.words(codes, groups)
    columns = nibbles(codes).unflatten(-1, (groups, -1, 2, 8))
    return (columns[..., 0, :] | columns[..., 1, :] << 4).transpose(-2, -3).flatten(-3)


def _from_words(codes: Tensor, groups: int) -> Tensor:
    """Undoes `_to_words`."""
    words = codes.unflatten(-1, (-1, groups, 8)).transpose(-2, -3)
    return pairs(halves(words & 15, words >> 4).flatten(-4))


def _row_unit(scale: Tensor) -> Tensor:
    """float32 [n, 1]: the largest number of which a row of scales [n, groups] are 1 to 15; 0 where there is none."""
    if native.fits(torch.float32, scale):
        return native.row_units(scale)
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
