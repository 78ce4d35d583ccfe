"""Which weights of a network are quantised to what, when that is asked for."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dgemma.quant.formats import FORMATS, W4A8, Float8, Int4, Int8
from dgemma.quant.packed import Packed

EXPERTS = r"layers\.\d+\.experts\.(gate_up|down)_proj"
DENSE = r"layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight"
EMBEDDING = "embed_tokens.weight"
GROUPS = (32, 64, 128)
BESIDE: dict[str, type[Packed]] = {"int4": Int8, "w4a8": Int8, "nvfp4": Float8}
"""What attention and dense MLPs get where experts get four bits."""


@dataclass(frozen=True)
class Quantization:
    """Experts, attention and dense MLPs in fewer bits; routers, norms, self-conditioning and vision stay as they are.

    format: "int8" (activations too, a token at a time), "fp8", or for the experts "int4", "w4a8" (int4 of scales that
    let products be of int8 numbers) or "nvfp4". Four bits are for the experts, nine tenths of the weights: attention
    and dense MLPs, which every token uses, get eight. group: columns that share a scale of int4 and w4a8; embeddings:
    the token embeddings, which are also the head, in int8.
    """

    format: str
    group: int = 32
    embeddings: bool = False

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"quantize={self.format!r} is not one of {', '.join(FORMATS)}")
        if self.group not in GROUPS:
            raise ValueError(f"group {self.group} is not one of {', '.join(map(str, GROUPS))}")

    def of(self, name: str) -> type[Packed] | None:
        """The format of a weight, by the network's own name for it; None for one that stays."""
        if name == EMBEDDING:
            return Int8 if self.embeddings else None
        if re.fullmatch(DENSE, name):
            return BESIDE.get(self.format) or FORMATS[self.format]
        return FORMATS[self.format] if re.fullmatch(EXPERTS, name) else None

    def chosen(self, names: Iterable[str]) -> frozenset[str]:
        return frozenset(name for name in names if self.of(name))

    def options(self, name: str) -> dict[str, Any]:
        """What the format is made with besides its parts: whether products of int8 round the activations."""
        return {"activations": name != EMBEDDING and self.format != "int4"} if self.of(name) is Int8 else {}

    def pack(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, weights: Iterable[tuple[Any, Tensor]]
    ) -> Packed:
        """A matrix or stack of this shape in its format, piece by piece: dense rows, each with their index in it."""
        kind = self.of(name)
        if kind is None:
            raise ValueError(f"{name} is not quantised to {self.format}")
        self.check(name, shape[-1])
        buffers: dict[str, Tensor] = {}
        for index, weight in weights:
            for part, rows in kind.encode(weight, self.group).items():
                if part not in buffers:
                    buffers[part] = torch.empty(*shape[:-1], rows.shape[-1], dtype=rows.dtype)
                buffers[part][index] = rows
        return kind(shape, dtype, **self.options(name), **buffers)

    def check(self, name: str, columns: int) -> None:
        kind = self.of(name)
        group = {"int4": self.group, "w4a8": self.group, "nvfp4": 16}.get(kind.kind if kind else "", 1)
        if columns % group or (group > 1 and columns % 8):
            fitting = ", ".join(str(g) for g in GROUPS if columns % g == 0) if kind in (Int4, W4A8) else ""
            hint = f"; groups of {fitting} would" if fitting else ""
            raise ValueError(f"{name} has {columns} columns, which groups of {group} do not divide{hint}")
