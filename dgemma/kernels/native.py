"""Decoding in C, where a compiler was at hand when the package was installed; callers fall back on plain PyTorch.

Made of decode.c by setuptools, as an extension that may fail to build. It calls OpenMP without being linked to it, and
so finds the threads of torch, which has to be imported before.
"""

import ctypes
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

_DTYPES = (torch.bfloat16, torch.float32)


@cache
def library() -> ctypes.CDLL | None:
    """The functions of decode.c, or None where they were not built or cannot be loaded."""
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_decode{suffix}")
        if path.exists():
            try:
                return ctypes.CDLL(str(path))
            except OSError:
                return None
    return None


def fits(dtype: torch.dtype, *parts: Tensor) -> bool:
    """Whether these buffers of a matrix can be decoded here, to `dtype`."""
    usable = all(part.device.type == "cpu" and part.is_contiguous() for part in parts)
    return usable and dtype in (*_DTYPES, torch.int8) and library() is not None


def int4(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., 2 * bytes] in `dtype` of uint8 codes [..., bytes] and scales [..., groups] of 16 bytes or more."""
    out, bytes = _out(codes, 2, dtype), codes.shape[-1]
    _call("int4", codes, scale.float(), out, dtype, _rows(codes), bytes, scale.shape[-1])
    return out


def nvfp4(codes: Tensor, scale: Tensor, factor: Tensor, divide: bool, dtype: torch.dtype) -> Tensor:
    """As `int4`, with e4m3 scales [..., bytes / 8] that are divided by, or times, float32 factors [..., 1]."""
    out = _out(codes, 2, dtype)
    _call("nvfp4", codes, scale, factor, int(divide), out, dtype, _rows(codes), codes.shape[-1])
    return out


def fp8(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., columns] in `dtype` of e4m3 codes, uint8, and scales [..., 1]."""
    out = _out(codes, 1, dtype)
    _call("fp8", codes, scale.float(), out, dtype, _rows(codes), codes.shape[-1])
    return out


def w4a8(codes: Tensor, multiple: Tensor) -> Tensor:
    """int8 [..., 2 * bytes] of uint8 codes [..., bytes] in words, and multiples uint8 [..., groups]."""
    out = _out(codes, 2, torch.int8)
    _call("w4a8", codes, multiple, out, _rows(codes), codes.shape[-1], multiple.shape[-1])
    return out


def _out(codes: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(*codes.shape[:-1], columns * codes.shape[-1], dtype=dtype)


def _rows(codes: Tensor) -> int:
    return codes[..., 0].numel()


def _call(name: str, *arguments: Tensor | torch.dtype | int) -> None:
    found = library()
    assert found is not None
    converted: list[ctypes.c_void_p | ctypes.c_int | ctypes.c_int64] = []
    for value in arguments:
        if isinstance(value, Tensor):
            converted.append(ctypes.c_void_p(value.data_ptr()))
        elif isinstance(value, torch.dtype):
            converted.append(ctypes.c_int(value == torch.float32))
        else:
            converted.append(ctypes.c_int64(value))
    getattr(found, name)(*converted)
