"""Quantised matrices that stay as they lie in the file; where they are used, a tile of rows is decoded at a time."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgemma.kernels import native
from dgemma.model.layers import linear

TILE_BYTES = 1 << 20
"""Of a decoded tile on a CPU: it is read again at once, from the processor's cache."""


class Packed(nn.Module):
    """A matrix [out, in], or a stack of them [E, out, in], in a quantised format.

    Each buffer holds rows: [(E,) out, …]. `dtype` is what products are computed in.
    """

    kind: ClassVar[str]

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, **parts: Tensor):
        super().__init__()
        self.shape, self.dtype = torch.Size(shape), dtype
        for name, part in parts.items():
            if part.shape[: len(shape) - 1] != self.shape[:-1]:
                raise ValueError(f"{name} has shape {list(part.shape)}, which are not rows of a matrix {list(shape)}")
            self.register_buffer(name, part)

    @classmethod
    def encode(cls, weight: Tensor, group: int) -> dict[str, Tensor]:
        """The buffers of a matrix [out, in]; group: columns that share a scale, where the format leaves that open."""
        raise NotImplementedError

    def decode(self, *parts: Tensor) -> Tensor:
        """Rows [n, in] in `dtype`, their columns in the order of `arrange`, of the buffers' rows."""
        raise NotImplementedError

    def arrange(self, x: Tensor) -> Tensor:
        """The last axis in the order in which `decode` finds it cheapest to give columns."""
        return x

    def restore(self, x: Tensor) -> Tensor:
        """Undoes `arrange`."""
        return x

    @property
    def device(self) -> torch.device:
        return next(self.buffers()).device

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.buffers())

    @property
    def step(self) -> int:
        """Rows of a tile."""
        wide = self.shape[-1] * self.dtype.itemsize
        return max(16, TILE_BYTES // wide) if self.device.type == "cpu" else self.shape[-2]

    def parts(self, at: int | None) -> list[Tensor]:
        """The buffers, or what they hold of one of a stack by its number."""
        return [part if at is None else part[at] for part in self.buffers()]

    def rows(self, at: int | None, chosen: Any = slice(None)) -> Tensor:
        """Decoded rows of a matrix, or of one of a stack by its number."""
        return self.decode(*(part[chosen] for part in self.parts(at)))

    def dense(self, at: int | None = None) -> Tensor:
        """The matrix, or all of the stack, that the buffers mean: the format's reference dequantisation."""
        return self.restore(self.rows(at))

    def product(self, x: Tensor, at: int | None = None) -> Tensor:
        """x [n, in] W^T, [n, out]; differentiable in x.

        A format whose product rounds x as well has the gradient of the unrounded one: a straight-through estimator.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            return _Product.apply(x, self, at)
        return self.multiply(x, at)

    def stored(self, at: int | None) -> native.Stored | None:
        """The matrix of a stack by its number, or all of it, as `native.grouped_stored` takes it; None if it cannot."""
        return None

    def multiply(self, x: Tensor, at: int | None = None) -> Tensor:
        """`product` without a gradient."""
        x = self.arrange(x)
        stored = self.stored(at)
        if stored and native.fits_stored(x, stored):
            return native.grouped_stored(x, torch.tensor([0, len(x)]), stored)
        tiles = range(0, self.shape[-2], self.step)
        parts = [linear(x, self.rows(at, slice(first, first + self.step))) for first in tiles]
        return torch.cat(parts, -1) if len(parts) > 1 else parts[0]

    def grouped(self, x: Tensor, counts: Tensor) -> Tensor:
        """x [N, in], sorted so that the first counts[0] rows meet the stack's first matrix and so on, [N, out]."""
        stored = None if torch.is_grad_enabled() and x.requires_grad else self.stored(None)
        if stored and native.fits_stored(x, stored):
            return native.grouped_stored(self.arrange(x), F.pad(counts.cumsum(0), (1, 0)), stored)
        parts = enumerate(x.split(counts.tolist()))
        return torch.cat([self.product(rows, at) for at, rows in parts if len(rows)])

    def transposed(self, y: Tensor, at: int | None = None) -> Tensor:
        """y [n, out] W, [n, in]."""
        total = y.new_zeros(len(y), self.shape[-1])
        for first in range(0, self.shape[-2], self.step):
            chosen = slice(first, first + self.step)
            total.addmm_(y[:, chosen], self.rows(at, chosen))
        return self.restore(total)


class _Product(torch.autograd.Function):
    """Decodes again for the gradient, rather than keep the dense matrix for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Packed, at: int | None) -> Tensor:
        ctx.weight, ctx.at = weight, at
        return weight.multiply(x, at)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.weight.transposed(gradient, ctx.at), None, None


class Dense(Packed):
    """A stack that is not quantised, beside one that is."""

    kind = "dense"

    def __init__(self, weight: Tensor):
        super().__init__(tuple(weight.shape), weight.dtype, weight=weight)

    def decode(self, *parts: Tensor) -> Tensor:
        return parts[0]

    @property
    def step(self) -> int:
        return self.shape[-2]
