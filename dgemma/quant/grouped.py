"""Products of rows that are sorted by expert with a packed stack, by a kernel of `dgemma.kernels` where one fits."""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from dgemma.quant.formats import Float8, Int4, Nvfp4
from dgemma.quant.packed import Packed


@cache
def kernels() -> Any:
    """The Triton kernels; None where Triton is not installed."""
    return import_module("dgemma.kernels.grouped") if find_spec("triton") else None


def fits(x: Tensor, *matrices: Packed) -> bool:
    """Whether `grouped` can take these: on CUDA, without a gradient, in a format that has a kernel."""
    return has_kernel(*matrices) and not (torch.is_grad_enabled() and x.requires_grad)


def has_kernel(*matrices: Packed) -> bool:
    fused = all(isinstance(matrix, Float8 | Int4 | Nvfp4) and matrix.device.type == "cuda" for matrix in matrices)
    return fused and kernels() is not None


def grouped(matrix: Packed, x: Tensor, offsets: Tensor) -> Tensor:
    """x [N, in], expert e's rows from offsets[e] to offsets[e + 1], to [N, out]; a plain matrix is a stack of one."""
    parts = [part if len(matrix.shape) == 3 else part[None] for part in matrix.buffers()]
    match matrix:
        case Float8():
            return kernels().grouped_fp8(x, offsets, *parts)
        case Int4():
            return kernels().grouped_int4(x, offsets, *parts)
        case Nvfp4():
            return kernels().grouped_nvfp4(x, offsets, *parts, divide=matrix.divide)
    raise ValueError(f"there is no kernel for {matrix.kind}")
