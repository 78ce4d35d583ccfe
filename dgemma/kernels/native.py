"""What is in C, where a compiler was at hand when the package was installed; callers fall back on plain PyTorch.

Made by setuptools of the .c files beside it, as an extension that may fail to build. It calls OpenMP without being
linked to it, and so finds the threads of torch, which has to be imported before.
"""

import ctypes
import math
from dataclasses import dataclass
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

_DTYPES = (torch.bfloat16, torch.float32)
LANES = 32
"""Columns that vocabulary.c looks at together."""


@cache
def library() -> ctypes.CDLL | None:
    """The functions, or None where they were not built or cannot be loaded."""
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_native{suffix}")
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
    call("int4", codes, scale.float(), out, dtype, _rows(codes), bytes, scale.shape[-1])
    return out


def nvfp4(codes: Tensor, scale: Tensor, factor: Tensor, divide: bool, dtype: torch.dtype) -> Tensor:
    """As `int4`, with e4m3 scales [..., bytes / 8] that are divided by, or times, float32 factors [..., 1]."""
    out = _out(codes, 2, dtype)
    call("nvfp4", codes, scale, factor, int(divide), out, dtype, _rows(codes), codes.shape[-1])
    return out


def fp8(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., columns] in `dtype` of e4m3 codes, uint8, and scales [..., 1]."""
    out = _out(codes, 1, dtype)
    call("fp8", codes, scale.float(), out, dtype, _rows(codes), codes.shape[-1])
    return out


def w4a8(codes: Tensor, multiple: Tensor) -> Tensor:
    """int8 [..., 2 * bytes] of uint8 codes [..., bytes] in words, and multiples uint8 [..., groups]."""
    out = _out(codes, 2, torch.int8)
    call("w4a8", codes, multiple, out, _rows(codes), codes.shape[-1], multiple.shape[-1])
    return out


def row_units(scale: Tensor) -> Tensor:
    """float32 [n, 1] of float32 scales [n, groups]: the largest number of which they are 1 to 15 times, or 0."""
    units = torch.empty(len(scale), 1)
    call("row_units", scale, units, *scale.shape)
    return units


def words(codes: Tensor, groups: int) -> Tensor:
    """uint8 codes [..., bytes] of int4 in the order of w4a8."""
    out = torch.empty_like(codes)
    call("words", codes, out, _rows(codes), codes.shape[-1], groups)
    return out


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [n, in] and float32 scales [n, 1] of bfloat16 or float32 rows."""
    codes, scale = torch.empty_like(x, dtype=torch.int8), torch.empty(len(x), 1)
    call("quantise", x, x.dtype, codes, scale, *x.shape)
    return codes, scale


@cache
def has_tiles() -> bool:
    """Whether the processor has the tile registers that `grouped_tiles` is written for, and the system allows them."""
    found = library()
    return found is not None and bool(found.has_tiles())


@cache
def has_wide_vectors() -> bool:
    """Whether the processor has the vectors that floats.c is written for."""
    found = library()
    return found is not None and bool(found.has_wide_vectors())


def fits_grouped(x: Tensor, weight: Tensor) -> bool:
    """Whether `grouped` takes rows x [n, in] and a matrix or stack [..., out, in]: without a gradient, on a processor
    for which there is a function of their dtype.
    """
    learning = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    usable = x.is_cpu and weight.is_cpu and x.dtype == weight.dtype and weight.is_contiguous() and not learning
    if not usable or weight.dtype not in _DTYPES or library() is None:
        return False
    if weight.dtype == torch.float32:
        return has_wide_vectors()
    return weight.shape[-2] % 32 == 0 and weight.shape[-1] % 32 == 0 and has_tiles()


def grouped(x: Tensor, offsets: Tensor, weight: Tensor) -> Tensor:
    """[n, out] of rows x [n, in], expert e's from offsets[e] to offsets[e + 1], and weights [E, out, in]; one dtype."""
    out, x = x.new_empty(len(x), weight.shape[-2]), x.contiguous()
    if weight.dtype == torch.bfloat16:
        _call_tiles(x, offsets, Stored("plain", weight), out)
    else:
        experts = len(offsets) - 1
        panel = x.new_empty((len(x) + 16 * experts) * x.shape[1])
        call("grouped_floats", x, offsets, weight, panel, out, experts, *weight.shape[-2:])
    return out


FORMATS = ("plain", "w4a8", "int4", "nvfp4", "nvfp4 divided", "fp8", "int8")
"""In the order of tiles.c. Plain are bfloat16 numbers, and int8 ones that meet int8 ones."""


@dataclass(frozen=True)
class Stored:
    """A stack [E, out, in] as a format stores it; scale has a row of groups for each output, factor one number."""

    format: str
    codes: Tensor
    scale: Tensor | None = None
    factor: Tensor | None = None

    @property
    def groups(self) -> int:
        return 0 if self.scale is None else self.scale.shape[-1]


def fits_stored(x: Tensor, stored: Stored) -> bool:
    """Whether `grouped_stored` takes rows x [n, in]."""
    parts = [part for part in (stored.codes, stored.scale, stored.factor) if part is not None]
    usable = x.dtype == torch.bfloat16 and all(part.is_cpu and part.is_contiguous() for part in (x[:0], *parts))
    return usable and x.shape[1] % 32 == 0 and stored.codes.shape[-2] % 32 == 0 and has_tiles()


def grouped_stored(x: Tensor, offsets: Tensor, stored: Stored) -> Tensor:
    """`grouped` of a packed stack: 32 rows at a time become bfloat16 in the nearest cache. Columns of x as decoded."""
    out = x.new_empty(len(x), stored.codes.shape[-2])
    _call_tiles(x.contiguous(), offsets, stored, out)
    return out


def _call_tiles(
    x: Tensor, offsets: Tensor, stored: Stored, out: Tensor, own: Tensor | None = None, units: Tensor | None = None
) -> None:
    experts = len(offsets) - 1
    panel = torch.empty((len(x) + 32 * experts) * x.shape[1] * x.element_size(), dtype=torch.uint8)
    scale = stored.scale
    if scale is not None and scale.dtype not in (*_DTYPES, torch.uint8):
        scale = scale.float()
    weight = (
        stored.codes,
        scale,
        scale.dtype if scale is not None else torch.float32,
        None if stored.factor is None else stored.factor.float(),
        units,
    )
    sizes = (FORMATS.index(stored.format), experts, out.shape[1], x.shape[1], stored.groups)
    call("grouped_tiles", x, own, offsets, *weight, panel, out, out.dtype, *sizes)


def has_dot_products() -> bool:
    """Whether the processor has the instructions that `grouped_int8` is written for."""
    found = library()
    return found is not None and bool(found.dot_products())


def grouped_int8(x: Tensor, own: Tensor, counts: Tensor, dtype: torch.dtype, codes: Tensor, *rest: Tensor) -> Tensor:
    """[n, out] in `dtype` of int8 rows x [n, in] with scales [n, 1], sorted by expert, so many for each.

    codes and rest: int8 [E, out, in] and units [E, out, 1]; or w4a8's codes, multiples and units.
    """
    *multiple, units = rest
    out = x.new_empty(len(x), codes.shape[-2], dtype=dtype)
    offsets = torch.zeros(len(codes) + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=offsets[1:])
    where = multiple[0] if multiple else None
    groups = multiple[0].shape[-1] if multiple else 0
    if has_tiles() and out.shape[1] % 32 == 0 and x.shape[1] % 64 == 0:
        stored = Stored("w4a8" if multiple else "plain", codes, where)
        _call_tiles(x.contiguous(), offsets, stored, out, own, units.float())
        return out
    higher = x.contiguous().view(torch.uint8) ^ 128
    sizes = (len(codes), codes.shape[-2], x.shape[-1], groups)
    call("grouped_int8", higher, own, offsets, codes, where, units.float(), out, dtype, *sizes)
    return out


def read_rows(scores: Tensor, cap: float, temperature: Tensor, uniform: Tensor) -> tuple[Tensor, ...]:
    """(best, proposal, entropy, total) [N] of scores [N, V], in whose place the weights are left, the greatest 1.

    temperature [N, 1], uniform [N]; as `decoding.vocabulary.weigh_`, its twin.
    """
    n, size = scores.shape
    best, proposal = (torch.empty(n, dtype=torch.int64) for _ in range(2))
    entropy, total = (torch.empty(n) for _ in range(2))
    inner, outer = _capped(cap, temperature.float())
    drawn = uniform.float().contiguous()
    call("read_rows", scores, scores.dtype, n, size, inner, outer, drawn, best, proposal, entropy, total)
    return best, proposal, entropy, total


class ByClass:
    """One canvas's scores [V, N], token by position, and what the classes of their tokens, int32 [V], make of them.

    peaks and log2 sums of the weights 2^z of each class, [N, kinds].
    """

    def __init__(self, scores: Tensor, classes: Tensor, kinds: int, cap: float, temperature: Tensor):
        self.scores, self.classes, self.kinds = scores, classes, kinds
        self.inner, self.outer = _capped(cap, temperature.float().view(1))
        self.chunks = -(-scores.shape[1] // LANES)
        self._peaks, sums = (torch.empty(self.chunks, kinds, LANES) for _ in range(2))
        self._over("weigh_classes", self._peaks, sums)
        self.peaks = self._by_position(self._peaks)
        self.sums = self._by_position(sums).log2() + self.peaks[:, 1:].amax(1, keepdim=True) - 90

    def believe(self, bonus: Tensor, chosen: Tensor, soft: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """The likeliest token of the chosen class and the entropy with a bonus [N, kinds] for each class, [N]; the
        weights without it [V, N], if `soft`, and their total [N]."""
        best, chosen = self._new(torch.int32), self._padded(chosen.int())
        entropy, total = self._new(torch.float32), self._new(torch.float32)
        free = torch.empty_like(self.scores) if soft else None
        gain = self._padded(bonus.float()).view(self.chunks, LANES, self.kinds).transpose(1, 2).contiguous()
        self._over("believe", self._peaks, gain, chosen, best, entropy, free, total)
        n = self.scores.shape[1]
        return best[:n].long(), entropy[:n], free, total[:n]

    def draw(self, drawn: Tensor, left: Tensor) -> Tensor:
        """A token of the drawn class of each position, at a share `left` of its weights, [N]; -1 for class 0."""
        tokens = self._new(torch.int32)
        self._over("draw", self._peaks, self._padded(drawn.int()), self._padded(left.float()), tokens)
        return tokens[: self.scores.shape[1]].long()

    def _over(self, name: str, *arguments: Tensor | None) -> None:
        size, columns = self.scores.shape
        about = (self.scores, self.scores.dtype, self.classes, self.inner, self.outer, size, columns, self.kinds)
        call(name, *about, *arguments)

    def _new(self, dtype: torch.dtype) -> Tensor:
        return torch.empty(self.chunks * LANES, dtype=dtype)

    def _padded(self, values: Tensor) -> Tensor:
        rest = self.chunks * LANES - len(values)
        return torch.cat((values, values.new_zeros(rest, *values.shape[1:])))

    def _by_position(self, values: Tensor) -> Tensor:
        return values.transpose(1, 2).reshape(-1, self.kinds)[: self.scores.shape[1]]


def _capped(cap: float, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """What a score, and what 1 / (2^that + 1), is multiplied by for the logarithm of its weight."""
    return torch.tensor([2 / (cap * math.log(2))]), -2 * cap / math.log(2) / temperature


def _out(codes: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(*codes.shape[:-1], columns * codes.shape[-1], dtype=dtype)


def _rows(codes: Tensor) -> int:
    return codes[..., 0].numel()


def call(name: str, *arguments: Tensor | torch.dtype | int | None) -> None:
    """A function of the library: tensors as pointers to their numbers, a dtype as whether it is float32."""
    found = library()
    assert found is not None
    converted: list[ctypes.c_void_p | ctypes.c_int | ctypes.c_int64] = []
    for value in arguments:
        if value is None or isinstance(value, Tensor):
            converted.append(ctypes.c_void_p(None if value is None else value.data_ptr()))
        elif isinstance(value, torch.dtype):
            converted.append(ctypes.c_int(value == torch.float32))
        else:
            converted.append(ctypes.c_int64(value))
    getattr(found, name)(*converted)
