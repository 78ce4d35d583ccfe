"""LoRA (arXiv 2106.09685), put into a network from outside: the weights stay, and scale * B A is learnt beside them.

Both modes run through the same layers, so one adapter serves both.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from dgemma.model.experts import Experts
from dgemma.model.layers import gated, linear
from dgemma.model.network import DiffusionGemma

PARTS = {
    "attention": r"layers\.\d+\.self_attn\.[qkvo]_proj",
    "mlp": r"layers\.\d+\.mlp\.(gate|up|down)_proj",
    "experts": r"layers\.\d+\.experts",
    "self_conditioning": r"self_conditioning\.(gate|up|down)_proj",
    "router": r"layers\.\d+\.router\.proj",
}
"""What can be adapted: the network's own names of the modules."""


@dataclass(frozen=True)
class Lora:
    """Which parts get a low-rank update of which rank. It counts alpha / rank times."""

    rank: int = 16
    alpha: float = 32.0
    parts: tuple[str, ...] = ("attention", "mlp", "experts", "self_conditioning")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, not {self.rank}")
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown or not self.parts:
            raise ValueError(f"parts must be some of {', '.join(PARTS)}, not {', '.join(unknown) or 'none'}")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class Pair(nn.Module):
    """A [..., rank, in] and B [..., out, rank] of one matrix [out, in], or of each in a stack [E, out, in]."""

    def __init__(self, shape: Sequence[int], rank: int, scale: float, dtype: torch.dtype, generator: torch.Generator):
        super().__init__()
        *stack, outputs, inputs = shape
        self.scale = scale
        # Kaiming's uniform draw with a = sqrt 5, as PEFT and nn.Linear begin.
        a = torch.empty(*stack, rank, inputs, dtype=dtype, device=generator.device)
        self.A = nn.Parameter(a.uniform_(-(inputs**-0.5), inputs**-0.5, generator=generator))
        self.B = nn.Parameter(a.new_zeros(*stack, outputs, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.A, self.B)

    def product(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """scale * B A x, for one A and B of a stack; the matrix B A is never made."""
        return linear(linear(x, a), b) * self.scale

    def fold(self, weight: Tensor) -> None:
        """Adds scale * B A to the weight, a matrix at a time, computed in float32 and then rounded."""
        for w, a, b in zip(*(t if t.dim() == 3 else t[None] for t in (weight, self.A, self.B)), strict=True):
            w.copy_(torch.addmm(w.float(), b.float(), a.float(), alpha=self.scale))


class LoraLinear(nn.Module):
    """A linear layer, whatever its weights are stored as, with its adapter."""

    def __init__(self, base: nn.Module, make: Callable[[Sequence[int]], Pair]):
        super().__init__()
        self.base, self.weight = base, make(shapes(base)["weight"])

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.weight(x)


class LoraExperts(Experts):
    """Experts with their adapters; it holds no weights of its own."""

    def __init__(self, base: Experts, make: Callable[[Sequence[int]], Pair]):
        nn.Module.__init__(self)
        self.base, self.count = base, base.count
        for name, shape in shapes(base).items():
            self.add_module(name, make(shape))

    def each(self, groups: Sequence[Tensor]) -> list[Tensor]:
        up, down = pairs(self).values()
        # Unbound once: the gradient of an index would fill a whole stack for each expert.
        stacks = (up.A.unbind(), up.B.unbind(), down.A.unbind(), down.B.unbind())
        base_up, base_down = self.base.products()
        outputs = []
        for e, (rows, up_a, up_b, down_a, down_b) in enumerate(zip(groups, *stacks, strict=True)):
            if len(rows):
                inner = gated(*(base_up(e, rows) + up.product(rows, up_a, up_b)).chunk(2, dim=-1))
                outputs.append(base_down(e, inner) + down.product(inner, down_a, down_b))
        return outputs


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The matrices of a module that can be adapted, by name."""
    if isinstance(module, Experts):
        count, hidden, inner = module.count, module.hidden, module.inner
        return {"gate_up_proj": (count, 2 * inner, hidden), "down_proj": (count, hidden, inner)}
    return {"weight": tuple(cast(Tensor, module.weight).shape)}


def add_lora(model: DiffusionGemma, lora: Lora, seed: int = 0) -> list[nn.Parameter]:
    """Freezes the network and returns the new parameters, the only ones that train. The output stays what it was."""
    pattern = "|".join(PARTS[part] for part in lora.parts)
    names = [name for name, _ in model.named_modules() if re.fullmatch(pattern, name)]
    return adapt(model, names, lora.rank, lora.scale, seed)


def adapt(model: DiffusionGemma, names: Iterable[str], rank: int, scale: float, seed: int = 0) -> list[nn.Parameter]:
    """`add_lora` for modules by name, each one that `PARTS` matches."""
    require_plain(model)
    generator = torch.Generator(model.device).manual_seed(seed)
    make = lambda shape: Pair(shape, rank, scale, model.dtype, generator)  # noqa: E731
    model.requires_grad_(False)
    for name in names:
        base = model.get_submodule(name)
        model.set_submodule(name, LoraExperts(base, make) if isinstance(base, Experts) else LoraLinear(base, make))
    return [parameter for pair in pairs(model).values() for parameter in pair.parameters()]


def require_plain(model: DiffusionGemma) -> None:
    """ValueError for a network that is adapted already."""
    if pairs(model):
        raise ValueError("the model has an adapter already; merge_lora folds it into the weights")


def pairs(model: nn.Module) -> dict[str, Pair]:
    """The adapters, each by the name of the weight that it changes."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Pair)}


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' tensors: `NAME.A` and `NAME.B` by the name of the weight that they change."""
    return {f"{name}.{key}": tensor for name, pair in pairs(model).items() for key, tensor in pair.state_dict().items()}


@torch.no_grad()
def merge_lora(model: DiffusionGemma) -> None:
    """Folds the adapters into the weights and puts the plain modules back. ValueError for quantised weights."""
    for name in pairs(model):
        base, _, weight = name.rpartition(".")
        if not isinstance(getattr(model.get_submodule(base).base, weight), Tensor):
            raise ValueError(f"{name} is quantised: an adapter cannot be merged into it; load the model unquantised")
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLinear | LoraExperts):
            for weight, pair in pairs(module).items():
                pair.fold(module.base.get_parameter(weight))
            model.set_submodule(name, module.base)
