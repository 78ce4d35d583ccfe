"""Products of rows with quantised weights, each row with its own expert's: Triton kernels.

The functions are those of `plain.py`, where arguments and rounding are described. Nothing here waits for the device:
the grid holds as many tiles as any split of the rows can need, and each program finds its expert by itself. All tensors
are on one device, weights and scales contiguous. There are no gradients. Importing this needs Triton.
"""

from dataclasses import dataclass

import torch
import triton  # type: ignore
import triton.language as tl  # type: ignore
from torch import Tensor

from dgemma.kernels import plain
from dgemma.kernels.plain import quantise_rows


@dataclass(frozen=True)
class Blocks:
    """What one program works on: powers of two, at least 16. `columns` counts stored ones: a byte of 4 bit is one."""

    rows: int
    outputs: int
    columns: int
    warps: int = 4
    stages: int = 3


def default_blocks(rows: int, experts: int, column_bytes: int) -> Blocks:
    """Sizes for N rows in all. Chosen by thought, not yet measured on a GPU.

    An expert gets room for twice the mean, since a second tile decodes the same weights again; a row of the weights is
    read 128 bytes at a time, or 64 where they are 4 bit, which become 128 columns.
    """
    mean = triton.cdiv(rows, experts)
    block = min(max(triton.next_power_of_2(2 * mean), 16), 64)
    return Blocks(block, 64 if block < 64 else 128, 128 // column_bytes)


def grouped_bf16(x: Tensor, offsets: Tensor, weight: Tensor, *, blocks: Blocks | None = None) -> Tensor:
    plain.check_bf16(x, offsets, weight)
    blocks = blocks or default_blocks(len(x), len(weight), 2)
    return _launch("bf16", _like(x, weight), x.contiguous(), offsets, weight, blocks)


def grouped_fp8(x: Tensor, offsets: Tensor, codes: Tensor, scale: Tensor, *, blocks: Blocks | None = None) -> Tensor:
    plain.check_fp8(x, offsets, codes, scale)
    blocks = blocks or default_blocks(len(x), len(codes), 1)
    rounded, row_scale = quantise_rows(x)
    return _launch(
        "fp8" if _multiplies_fp8(x.device) else "fp8 as f16",
        _like(x, codes),
        rounded.view(torch.uint8),
        offsets,
        codes.view(torch.uint8),
        blocks,
        row_scale=row_scale,
        factor=scale,
    )


def grouped_int4(x: Tensor, offsets: Tensor, codes: Tensor, scale: Tensor, *, blocks: Blocks | None = None) -> Tensor:
    group = plain.check_int4(x, offsets, codes, scale)
    blocks = blocks or default_blocks(len(x), len(codes), 2)
    return _launch("int4", _like(x, codes), _halves(x), offsets, codes, blocks, scale=scale, group=group)


def grouped_nvfp4(
    x: Tensor,
    offsets: Tensor,
    codes: Tensor,
    scale: Tensor,
    global_scale: Tensor,
    divide: bool = False,
    *,
    blocks: Blocks | None = None,
) -> Tensor:
    plain.check_nvfp4(x, offsets, codes, scale, global_scale)
    return _launch(
        "nvfp4",
        _like(x, codes),
        _halves(x),
        offsets,
        codes,
        blocks or default_blocks(len(x), len(codes), 2),
        scale=scale.view(torch.uint8),
        group=plain.NVFP4_GROUP,
        factor=global_scale,
        divide=divide,
    )


def _like(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(len(x), weight.shape[1])


def _halves(x: Tensor) -> Tensor:
    """x [N, K] as [N, 2, K / 2], even columns first.

    A byte's nibbles are weights of neighbouring columns: a tile of bytes multiplies the even ones by its low nibbles
    and the odd ones by its high ones, with no shuffle of the weights. Split once here, both are read in whole vectors;
    read with stride two, by every tile of outputs again, each element of x would be a load of its own.
    """
    return x.unflatten(-1, (-1, 2)).mT.contiguous()


def _multiplies_fp8(device: torch.device) -> bool:
    """Whether the device has float8 products (compute capability 8.9); elsewhere the codes become float16, exactly."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def _launch(
    layout: str,
    y: Tensor,
    x: Tensor,
    offsets: Tensor,
    weight: Tensor,
    blocks: Blocks,
    *,
    scale: Tensor | None = None,
    group: int = 2,
    factor: Tensor | None = None,
    row_scale: Tensor | None = None,
    divide: bool = False,
) -> Tensor:
    for name, tensor in (("the weight", weight), ("its scale", scale), ("its factor", factor)):
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous (strides {tensor.stride()}); give .contiguous()")
    if blocks.columns % (group // 2):
        raise ValueError(f"blocks of {blocks.columns} bytes do not hold whole groups of {group} columns")
    experts, outputs, columns = weight.shape
    grid = (len(y) // blocks.rows + experts, triton.cdiv(outputs, blocks.outputs))
    _product[grid](
        y,
        x,
        row_scale,
        offsets,
        weight,
        scale,
        factor,
        experts,
        outputs,
        columns,
        LAYOUT=layout,
        SHARED=group // 2,
        DIVIDE=divide,
        EXPERTS=max(16, triton.next_power_of_2(experts)),
        ROWS=blocks.rows,
        OUTPUTS=blocks.outputs,
        COLUMNS=blocks.columns,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    return y


@triton.jit
def _product(  # type: ignore
    y,
    x,
    row_scale,
    offsets,
    weight,
    scale,
    factor,
    experts: tl.constexpr,
    outputs: tl.constexpr,
    columns: tl.constexpr,
    LAYOUT: tl.constexpr,  # noqa: N803
    SHARED: tl.constexpr,  # noqa: N803
    DIVIDE: tl.constexpr,  # noqa: N803
    EXPERTS: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    OUTPUTS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
):
    """One tile of y. x [N, halves, columns] and weight [E, O, columns] as stored; a scale serves SHARED columns."""
    PACKED: tl.constexpr = LAYOUT == "int4" or LAYOUT == "nvfp4"  # noqa: N806
    # Neighbouring programs have the same outputs: tiles of one expert then find its weights in the cache.
    tile = tl.program_id(0)
    expert = _expert_of(tile, offsets, experts, EXPERTS, ROWS)
    begin = tl.load(offsets + expert)
    end = tl.load(offsets + expert + 1)
    first = begin + (tile - begin // ROWS - expert) * ROWS
    if first >= end:
        return

    row = (first + tl.arange(0, ROWS)).to(tl.int64)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    stacked = expert.to(tl.int64) * outputs + output
    real_row, real_output = (row < end)[:, None], output < outputs
    x_rows = x + row[:, None] * columns * (2 if PACKED else 1)
    weight_rows = weight + stacked[:, None] * columns

    total = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        inside = column < columns
        a = tl.load(x_rows + column, mask=real_row & inside, other=0)
        w = tl.load(weight_rows + column, mask=real_output[:, None] & inside, other=0)
        if PACKED:
            group = start // SHARED + tl.arange(0, COLUMNS // SHARED)[None, :]
            groups = columns // SHARED
            mask = real_output[:, None] & (group < groups)
            s = _scale(tl.load(scale + stacked[:, None] * groups + group, mask=mask, other=0), LAYOUT)
            b = tl.load(x_rows + columns + column, mask=real_row & inside, other=0)
            low = _scaled(_values(w & 15, LAYOUT), s).to(a.dtype)
            high = _scaled(_values(w >> 4, LAYOUT), s).to(a.dtype)
            total = tl.dot(a, tl.trans(low), total, input_precision="ieee")
            total = tl.dot(b, tl.trans(high), total, input_precision="ieee")
        elif LAYOUT == "fp8":
            a, w = a.to(tl.float8e4nv, bitcast=True), w.to(tl.float8e4nv, bitcast=True)
            # Hopper's own sums of float8 products keep few bits: each block's goes into float32.
            total = tl.dot(a, tl.trans(w), total, max_num_imprecise_acc=COLUMNS)
        elif LAYOUT == "fp8 as f16":
            total = tl.dot(_e4m3(a), tl.trans(_e4m3(w)), total)
        else:
            total = tl.dot(a, tl.trans(w), total, input_precision="ieee")

    if factor is not None:
        f = tl.load(factor + stacked, mask=real_output, other=1).to(tl.float32)
        total *= (1 / f if DIVIDE else f)[None, :]
    if row_scale is not None:
        total *= tl.load(row_scale + row, mask=row < end, other=0)[:, None]
    y_tile = y + row[:, None] * outputs + output[None, :]
    tl.store(y_tile, total.to(y.dtype.element_ty), mask=real_row & real_output[None, :])


@triton.jit
def _expert_of(tile, offsets, experts, EXPERTS: tl.constexpr, ROWS: tl.constexpr):  # type: ignore # noqa: N803
    """The expert of a tile of rows. Those of expert e begin with number offsets[e] // ROWS + e.

    This leaves each expert at least the tiles that it needs, so that no table of them has to be made: the last of those
    that begin at or before the tile is its expert.
    """
    e = tl.arange(0, EXPERTS) + 1
    real = e < experts
    begins = tl.load(offsets + e, mask=real, other=0) // ROWS + e
    return tl.sum((real & (begins <= tile)).to(tl.int32), 0)


@triton.jit
def _values(nibbles, LAYOUT: tl.constexpr):  # type: ignore # noqa: N803
    """4-bit codes as float32: in nvfp4 times 2^-14, which `_scale` makes good."""
    if LAYOUT == "int4":
        return nibbles.to(tl.float32) - 8
    # e2m1's bits are float16's, but for the exponent's bias: 1 against 15.
    bits = nibbles.to(tl.uint16)
    return (((bits & 8) << 12) | ((bits & 7) << 9)).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _scale(stored, LAYOUT: tl.constexpr):  # type: ignore # noqa: N803
    """Scales of groups as float32."""
    if LAYOUT == "int4":
        return stored.to(tl.float32)
    return _e4m3(stored).to(tl.float32) * 16384.0


@triton.jit
def _e4m3(codes):  # type: ignore
    """e4m3 as float16, exactly; its bits are float16's, but for the exponent's bias: 7 against 15. No NaN is known."""
    bits = codes.to(tl.uint16)
    return (((bits & 128) << 8) | ((bits & 127) << 7)).to(tl.float16, bitcast=True) * 256.0


@triton.jit
def _scaled(values, scale):  # type: ignore
    """Values [outputs, columns] times a scale [outputs, groups] of neighbouring columns."""
    shared: tl.constexpr = values.shape[1] // scale.shape[1]
    grouped = tl.reshape(values, (values.shape[0], scale.shape[1], shared))
    return tl.reshape(grouped * scale[:, :, None], (values.shape[0], values.shape[1]))
