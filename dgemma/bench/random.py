"""The network of any shape and format with random weights, made where it will run: no file, no second copy."""

from math import gcd

import torch
from torch import Tensor

from dgemma.checkpoints.empty import empty_model
from dgemma.config import ModelConfig
from dgemma.model.network import DiffusionGemma
from dgemma.quant.modules import install
from dgemma.quant.packed import Packed
from dgemma.quant.quantize import Quantization

SAMPLE_ROWS = 64
"""So many random rows are quantised, and repeated: the contents of the others cost nothing else."""


def random_model(config: ModelConfig, format: str | None, device: str = "cpu") -> DiffusionGemma:
    """In bfloat16, with what `dgemma quantize` would pack in `format`."""
    generator = torch.Generator(device).manual_seed(0)
    wish = Quantization(format) if format else None
    model = empty_model(config, torch.bfloat16)
    tensors: dict[str, Tensor] = {}
    matrices: dict[str, Packed] = {}
    for name, tensor in model.state_dict().items():
        kind = wish.of(name) if wish else None
        if wish and kind:
            wish.check(name, tensor.shape[-1])
            rows = gcd(SAMPLE_ROWS, tensor.shape[-2])
            sample = torch.empty(rows, tensor.shape[-1], device=device).normal_(0, 0.02, generator=generator)
            count = tensor.shape[-2] // rows
            parts = {part: few.repeat(count, 1) for part, few in kind.encode(sample, wish.group).items()}
            if tensor.dim() == 3:
                parts = {part: one.repeat(tensor.shape[0], 1, 1) for part, one in parts.items()}
            matrices[name] = kind(tuple(tensor.shape), torch.bfloat16, **wish.options(name), **parts)
        elif tensor.dim() > 1:
            made = torch.empty(tensor.shape, dtype=torch.bfloat16, device=device)
            tensors[name] = made.normal_(0, 0.02, generator=generator)
        else:
            fill = tensor.shape[0] ** -0.5 if name.endswith("q_norm.weight") else 1.0
            tensors[name] = torch.full(tensor.shape, fill, dtype=torch.bfloat16, device=device)
    model.load_state_dict(tensors, assign=True, strict=False)
    install(model, matrices)
    return model.eval().requires_grad_(False)
