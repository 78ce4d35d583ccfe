"""Which weights of a network are quantised to what, when that is asked for."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dgemma.quant.formats import FORMATS, W4A8, Int4, Int8
from dgemma.quant.packed import Packed

LARGE = r"layers\.\d+\.(self_attn\.[qkvo]_proj\.weight|mlp\.(gate|up|down)_proj\.weight|experts\.(gate_up|down)_proj)"
EMBEDDING = "embed_tokens.weight"
GROUPS = (32, 64, 128)


@dataclass(frozen=True)
class Quantization:
    """Attention, dense MLPs and experts in a format; routers, norms, self-conditioning and vision stay as they are.

    format: "int8" (activations too, a token at a time), "fp8", "int4", "w4a8" (int4 of scales that let products be of
    int8 numbers) or "nvfp4"; group: columns that share a scale of int4 and w4a8; embeddings: the token embeddings,
    which are also the head, in int8.
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
        return FORMATS[self.format] if re.fullmatch(LARGE, name) else None

    def chosen(self, names: Iterable[str]) -> frozenset[str]:
        return frozenset(name for name in names if self.of(name))

    def options(self, name: str) -> dict[str, Any]:
        """What the format is made with besides its parts: int8 rounds the activations of all but the embeddings."""
        return {"activations": name != EMBEDDING} if self.of(name) is Int8 else {}

    def pack(self, name: str, weight: Tensor) -> Packed:
        """A weight [out, in], or a stack of them matrix by matrix, in its format and its own dtype."""
        kind = self.of(name)
        if kind is None:
            raise ValueError(f"{name} is not quantised to {self.format}")
        self.check(name, weight.shape[-1])
        matrices = weight if weight.dim() == 3 else weight[None]
        parts = [kind.encode(matrix, self.group) for matrix in matrices]
        buffers = {key: torch.stack([part[key] for part in parts]) for key in parts[0]}
        if weight.dim() == 2:
            buffers = {key: buffer[0] for key, buffer in buffers.items()}
        return kind(tuple(weight.shape), weight.dtype, **self.options(name), **buffers)

    def check(self, name: str, columns: int) -> None:
        kind = self.of(name)
        group = {"int4": self.group, "w4a8": self.group, "nvfp4": 16}.get(kind.kind if kind else "", 1)
        if columns % group or (group > 1 and columns % 8):
            fitting = ", ".join(str(g) for g in GROUPS if columns % g == 0) if kind in (Int4, W4A8) else ""
            hint = f"; groups of {fitting} would" if fitting else ""
            raise ValueError(f"{name} has {columns} columns, which groups of {group} do not divide{hint}")
