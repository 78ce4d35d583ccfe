"""Small random networks with every tensor different, and their directories."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dgemma.checkpoints.save import save_model
from dgemma.config import GenerationConfig, ModelConfig
from dgemma.model.network import DiffusionGemma

TEXT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "top_k_experts": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_global_key_value_heads": 1,
    "global_head_dim": 32,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_hidden_layers": 2,
    "sliding_window": 8,
    "max_position_embeddings": 256,
    "model_type": "diffusion_gemma_text",
    "use_bidirectional_attention": "vision",
}
VISION = {
    "model_type": "gemma4_vision",
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "global_head_dim": 12,
    "patch_size": 4,
    "pooling_kernel_size": 3,
    "position_embedding_size": 16,
    "rope_parameters": {"rope_theta": 100.0, "rope_type": "axial"},
    "standardize": True,
    "use_clipped_linears": False,
    "dtype": "bfloat16",
}


def config_dict(vision: bool = True) -> dict[str, Any]:
    return {
        "model_type": "diffusion_gemma",
        "architectures": ["DiffusionGemmaForBlockDiffusion"],
        "canvas_length": 8,
        "dtype": "float32",
        "boi_token_id": 90,
        "eoi_token_id": 91,
        "image_token_id": 92,
        "text_config": dict(TEXT),
        "vision_config": dict(VISION) if vision else None,
    }


def random_model(vision: bool = True, dtype: torch.dtype = torch.float32) -> DiffusionGemma:
    model = DiffusionGemma(ModelConfig.from_dict(config_dict(vision)))
    generator = torch.Generator().manual_seed(0)
    for tensor in model.state_dict().values():
        centre, spread = (0.0, 0.2) if tensor.dim() > 1 else (1.0, 0.1)
        tensor.normal_(centre, spread, generator=generator)
    return model.to(dtype).eval()


def prompt_and_canvas(vocabulary: int) -> tuple[Tensor, Tensor]:
    """int64 [1, 13] and [1, 8]: the prompt is longer than the window of 8."""
    generator = torch.Generator().manual_seed(1)
    # Below the image tokens' ids.
    return tuple(torch.randint(3, vocabulary - 16, (1, length), generator=generator) for length in (13, 8))  # type: ignore[return-value]


@pytest.fixture(scope="session")
def make_model() -> Callable[..., DiffusionGemma]:
    return random_model


@pytest.fixture(scope="session")
def inputs() -> Callable[[int], tuple[Tensor, Tensor]]:
    return prompt_and_canvas


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """Saves a network into a new directory and returns that."""

    def save(model: DiffusionGemma, name: str = "model", **options: Any) -> Path:
        save_model(model, tmp_path / name, GenerationConfig(), **options)
        return tmp_path / name

    return save


@pytest.fixture
def edit_json() -> Callable[..., None]:
    """Changes top-level fields of a JSON file; None removes one."""

    def edit(path: Path, **changes: Any) -> None:
        values = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))

    return edit
