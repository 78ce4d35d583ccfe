"""Networks with an image tower, ours and the reference's, and the same pictures for both."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from parity.reference import VISION, make_reference, reference
from torch import Tensor

from dgemma.config import ModelConfig, VisionConfig
from dgemma.model.network import DiffusionGemma
from dgemma.picture import Patches, Picture, Placed

inputs = reference.images


def with_tower(config: ModelConfig, rng: random.Random, **changes: Any) -> ModelConfig:
    """The config with a tiny tower of any shape that the family allows, and an image token at the vocabulary's end."""
    heads, size = rng.choice((1, 2, 3)), rng.choice((4, 8, 12))
    values = VISION | {
        "hidden_size": rng.choice((12, 20)),
        "intermediate_size": rng.choice((16, 28)),
        "num_hidden_layers": rng.choice((1, 2, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": size,
        "global_head_dim": size,
        "patch_size": rng.choice((2, 4)),
        # At 1 the reference keeps the padding and drops the rest.
        "pooling_kernel_size": rng.choice((2, 3)),
        "position_embedding_size": 40,
        "standardize": rng.random() < 0.5,
        "use_clipped_linears": rng.random() < 0.3,
        "rms_norm_eps": rng.choice((1e-6, 1e-3)),
        "rope_parameters": {"rope_type": "axial", "rope_theta": rng.choice((10.0, 100.0))},
    }
    values |= changes
    return replace(config, vision=VisionConfig.from_dict(values), image_token_id=config.vocab_size - 1)


def make_pair(config: ModelConfig, seed: int) -> tuple[DiffusionGemma, Any]:
    """(ours, theirs), with the same random weights and, in the tower, bounds that bite."""

    def adjust(ours: DiffusionGemma) -> None:
        for name, tensor in ours.state_dict().items():
            if name.endswith(("input_min", "output_min")):
                tensor.sub_(2.0)

    return make_reference(config, seed, adjust)


def picture(config: ModelConfig, rows: int, columns: int, seed: int) -> Picture:
    """A random one of rows × columns soft tokens."""
    assert config.vision
    k = config.vision.pooling_kernel_size
    shape = (rows * columns * k * k, 3 * config.vision.patch_size**2)
    return Patches(np.random.default_rng(seed).integers(0, 256, shape, np.uint8), rows * k, columns * k)


def prompt_of(parts: Sequence[Picture | list[int]], config: ModelConfig) -> tuple[Tensor, list[Placed]]:
    """Tokens [T] of texts and pictures in their order, and where the pictures are."""
    assert config.vision
    tokens: list[int] = []
    placed = []
    for part in parts:
        if isinstance(part, Patches):
            count = len(part.patches) // config.vision.pooling_kernel_size**2
            placed.append(Placed(part, len(tokens), len(tokens) + count))
            tokens += [config.image_token_id or 0] * count
        else:
            tokens += part
    return torch.tensor(tokens), placed
