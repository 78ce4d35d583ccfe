"""The image tower's tensors, so that a checkpoint with one is read, kept and written whole."""

import torch
from torch import nn

from dgemma.config import VisionConfig
from dgemma.model.layers import RMSNorm

EPS = 1e-6


class ClippedLinear(nn.Module):
    """A linear layer with the bounds that some releases of the tower store beside it."""

    def __init__(self, inputs: int, outputs: int, clipped: bool):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=False)
        for name in ("input_min", "input_max", "output_min", "output_max") if clipped else ():
            self.register_buffer(name, torch.tensor(float("inf" if name.endswith("max") else "-inf")))


class VisionLayer(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        hidden, clipped = config.hidden_size, config.use_clipped_linears
        width = config.num_attention_heads * config.head_dim
        self.self_attn = nn.ModuleDict(
            {
                **{name: ClippedLinear(hidden, width, clipped) for name in ("q_proj", "k_proj", "v_proj")},
                "o_proj": ClippedLinear(width, hidden, clipped),
                "q_norm": RMSNorm(config.head_dim, EPS),
                "k_norm": RMSNorm(config.head_dim, EPS),
            }
        )
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": ClippedLinear(hidden, config.intermediate_size, clipped),
                "up_proj": ClippedLinear(hidden, config.intermediate_size, clipped),
                "down_proj": ClippedLinear(config.intermediate_size, hidden, clipped),
            }
        )
        self.input_layernorm = RMSNorm(hidden, EPS)
        self.post_attention_layernorm = RMSNorm(hidden, EPS)
        self.pre_feedforward_layernorm = RMSNorm(hidden, EPS)
        self.post_feedforward_layernorm = RMSNorm(hidden, EPS)


class PatchEmbedder(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.input_proj = nn.Linear(3 * config.patch_size**2, config.hidden_size, bias=False)
        self.position_embedding_table = nn.Parameter(torch.ones(2, config.position_embedding_size, config.hidden_size))


class VisionTower(nn.Module):
    """Gemma 4's image encoder and the projection of its soft tokens into the text model."""

    def __init__(self, config: VisionConfig, text_hidden: int):
        super().__init__()
        self.patch_embedder = PatchEmbedder(config)
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))
        self.embedding_projection = nn.Linear(config.hidden_size, text_hidden, bias=False)
        if config.standardize:
            self.register_buffer("std_bias", torch.zeros(config.hidden_size))
            self.register_buffer("std_scale", torch.ones(config.hidden_size))
