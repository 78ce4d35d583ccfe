"""Quantised matrices in the network's places, put there from outside."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgemma.model.experts import Experts, Product
from dgemma.model.head import TiedEmbedding
from dgemma.model.layers import gated
from dgemma.model.network import DiffusionGemma
from dgemma.quant.grouped import fits, grouped, has_kernel
from dgemma.quant.packed import Dense, Packed

STACKS = ("gate_up_proj", "down_proj")


class QuantLinear(nn.Module):
    """A linear layer without bias over a packed matrix."""

    def __init__(self, weight: Packed):
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if fits(rows, self.weight):
            y = grouped(self.weight, rows, torch.arange(2, device=x.device) * len(rows))
        else:
            y = self.weight.product(rows)
        return y.view(*x.shape[:-1], -1)


class QuantExperts(Experts):
    """Experts over packed stacks."""

    gate_up_proj: Packed  # type: ignore[assignment]
    down_proj: Packed  # type: ignore[assignment]

    def __init__(self, base: Experts, gate_up_proj: Packed, down_proj: Packed):
        nn.Module.__init__(self)
        self.count, self.hidden, self.inner = base.count, base.hidden, base.inner
        self.gate_up_proj, self.down_proj = gate_up_proj, down_proj

    @property
    def waits(self) -> bool:
        return not has_kernel(self.gate_up_proj, self.down_proj)

    def sorted(self, rows: Tensor, counts: Tensor) -> Tensor:
        if not fits(rows, self.gate_up_proj, self.down_proj):
            return self.down_proj.grouped(gated(*self.gate_up_proj.grouped(rows, counts).chunk(2, dim=-1)), counts)
        offsets = F.pad(counts.cumsum(0), (1, 0))
        inner = gated(*grouped(self.gate_up_proj, rows, offsets).chunk(2, dim=-1))
        return grouped(self.down_proj, inner, offsets)

    def products(self) -> tuple[Product, Product]:
        return (
            lambda e, x: self.gate_up_proj.product(x, e),
            lambda e, x: self.down_proj.product(x, e),
        )


class QuantEmbedding(TiedEmbedding):
    """Token embeddings, which are also the vocabulary head, over a packed matrix."""

    weight: Packed  # type: ignore[assignment]

    def __init__(self, base: TiedEmbedding, weight: Packed):
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim, self.cap = base.num_embeddings, base.embedding_dim, base.cap
        self.weight = weight

    def forward(self, tokens: Tensor) -> Tensor:
        flat = self.weight.restore(self.weight.rows(None, tokens.flatten()))
        return flat.view(*tokens.shape, -1) * self.scale

    def expected(self, weights: Tensor) -> Tensor:
        return self.weight.transposed(weights.reshape(-1, weights.shape[-1])).view(*weights.shape[:-1], -1)

    def scores(self, x: Tensor) -> Tensor:
        return self.weight.product(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)

    def scores_by_token(self, x: Tensor) -> Tensor:
        return self.weight.product(x).t()


def install(model: DiffusionGemma, packed: dict[str, Packed]) -> None:
    """Puts packed matrices in the places of the weights that they are named after."""
    modules = {name: model.get_submodule(name) for name in {name.rpartition(".")[0] for name in packed}}
    for name, module in modules.items():
        if isinstance(module, Experts):
            stacks = [packed.get(f"{name}.{stack}") or Dense(getattr(module, stack)) for stack in STACKS]
            model.set_submodule(name, QuantExperts(module, *stacks))
        elif isinstance(module, TiedEmbedding):
            model.set_submodule(name, QuantEmbedding(module, packed[f"{name}.weight"]))
        else:
            model.set_submodule(name, QuantLinear(packed[f"{name}.weight"]))


def matrices(model: DiffusionGemma) -> dict[str, Packed]:
    """The packed matrices of a network, by the name of the weight whose place they take."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Packed)}
