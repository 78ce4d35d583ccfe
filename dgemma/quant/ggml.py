"""ggml's block formats: what the rows of a quantised GGUF tensor hold, and their values.

A row is a run of blocks; a block holds a few float16 scales and packed codes of 32 or 256 neighbours, little endian.
Shapes: n = blocks of a row, e = elements of a block. Source: the structs of llama.cpp's ggml-common.h.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dgemma.quant.ggml_types import SIZES
from dgemma.quant.packed import Packed

_EVERY_BYTE = 0x0101010101010101
_DIAGONAL = 0x8040201008040201 - (1 << 64)
"""Bit i of byte i, as the int64 it is."""


@dataclass(frozen=True)
class Block:
    """Elements and bytes of one block; `values` makes of uint8 [..., n, bytes] the float32 of n * e elements."""

    elements: int
    bytes: int
    values: Callable[[Tensor], Tensor]


def decode(type: str, rows: Tensor) -> Tensor:
    """float32 [..., in] of uint8 rows [..., row_bytes], bit for bit what ggml's reference makes of them.

    ValueError for a type that is not in BLOCKS and for rows that are no whole number of blocks.
    """
    block = BLOCKS.get(type)
    if block is None:
        raise ValueError(f"ggml type {type!r} is not known; known are {', '.join(BLOCKS)}")
    if rows.dtype != torch.uint8 or rows.shape[-1] % block.bytes:
        raise ValueError(f"rows of {type} are uint8 in blocks of {block.bytes} bytes, not {rows.dtype} {[*rows.shape]}")
    count = rows.shape[-1] // block.bytes
    return block.values(rows.unflatten(-1, (count, block.bytes))).reshape(*rows.shape[:-1], count * block.elements)


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at this byte of each block, as float32 [..., n, 1]."""
    return blocks[..., at : at + 2].view(torch.float16).float()


def _nibbles(packed: Tensor, run: int) -> Tensor:
    """4-bit codes of bytes [..., b], as [..., b / run, 2, run]: each run's low halves come before its high halves."""
    packed = packed.contiguous().unflatten(-1, (-1, 1, run))  # shifts crawl over short strided runs
    return torch.cat((packed & 15, packed >> 4), dim=-2)


def _bits(packed: Tensor, width: int) -> Tensor:
    """Fields of `width` bits of bytes [..., 1, b], lowest first, as bits 4 and up of [..., 8 / width, b]."""
    words = packed.contiguous().view(torch.int64)  # eight bytes at once
    shifts = torch.arange(0, 8, width, device=packed.device)[:, None]
    fields = (words >> shifts).bitwise_and_(((1 << width) - 1) * _EVERY_BYTE)
    return fields.bitwise_left_shift_(4).view(torch.uint8)


def _fifth_bits(blocks: Tensor, at: int) -> Tensor:
    """Bit i of the 32-bit word at this byte of each block, as bit 4 of [..., n, i]."""
    words = blocks[..., at : at + 4].long().mul_(_EVERY_BYTE).bitwise_and_(_DIAGONAL)
    # Byte i now holds bit i or nothing; adding 127 carries whatever is there into bit 7.
    words.add_(0x7F * _EVERY_BYTE).bitwise_right_shift_(3).bitwise_and_(0x10 * _EVERY_BYTE)
    return words.view(torch.uint8)


def _signed(codes: Tensor, zero: int) -> Tensor:
    """codes - zero, as float32; the bytes wrap around, which int8 reads as negative."""
    return codes.sub_(zero).view(torch.int8).float()


def _q4_0(blocks: Tensor) -> Tensor:
    return _signed(_nibbles(blocks[..., 2:], 16).flatten(-3), 8).mul_(_half(blocks, 0))


def _q4_1(blocks: Tensor) -> Tensor:
    codes = _nibbles(blocks[..., 4:], 16).flatten(-3).float()
    return codes.mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q5_0(blocks: Tensor) -> Tensor:
    codes = _nibbles(blocks[..., 6:], 16).flatten(-3).bitwise_or_(_fifth_bits(blocks, 2))
    return _signed(codes, 16).mul_(_half(blocks, 0))


def _q5_1(blocks: Tensor) -> Tensor:
    codes = _nibbles(blocks[..., 8:], 16).flatten(-3).bitwise_or_(_fifth_bits(blocks, 4))
    return codes.float().mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[..., 2:].view(torch.int8).float().mul_(_half(blocks, 0))


def _scale_and_shift(codes: Tensor, blocks: Tensor) -> Tensor:
    """q4_K and q5_K: codes [..., n, 8, 32] times a scale less a minimum a group, each of 6 bits times one a block."""
    packed = blocks[..., 4:16]
    first, second, rest = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = torch.cat((first & 63, rest & 15 | first >> 6 << 4), dim=-1)
    minima = torch.cat((second & 63, rest >> 4 | second >> 6 << 4), dim=-1)
    scales, minima = (scales * _half(blocks, 0)).unsqueeze(-1), (minima * _half(blocks, 2)).unsqueeze(-1)
    return codes.float().mul_(scales).sub_(minima)


def _q4_k(blocks: Tensor) -> Tensor:
    return _scale_and_shift(_nibbles(blocks[..., 16:], 32).flatten(-3, -2), blocks)


def _q5_k(blocks: Tensor) -> Tensor:
    high = _bits(blocks[..., 16:48].unsqueeze(-2), 1)
    return _scale_and_shift(_nibbles(blocks[..., 48:], 32).flatten(-3, -2).bitwise_or_(high), blocks)


def _q6_k(blocks: Tensor) -> Tensor:
    high = _bits(blocks[..., 128:192].unflatten(-1, (2, 1, 32)), 2)
    codes = _nibbles(blocks[..., :128], 64).flatten(-2).bitwise_or_(high.flatten(-2))
    scales = blocks[..., 192:208].view(torch.int8) * _half(blocks, 208)
    return _signed(codes.view(*blocks.shape[:-1], 16, 16), 32).mul_(scales.unsqueeze(-1))


_VALUES = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
BLOCKS = {name: Block(*SIZES[name], values) for name, values in _VALUES.items()}
"""By ggml's names."""


class Ggml(Packed):
    """Rows of ggml's blocks, of a type by its name."""

    kind = "gguf"

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, blocks_type: str, blocks: Tensor):
        super().__init__(shape, dtype, blocks=blocks)
        self.blocks_type = blocks_type

    def decode(self, blocks: Tensor) -> Tensor:  # type: ignore[override]
        return decode(self.blocks_type, blocks).to(self.dtype)
