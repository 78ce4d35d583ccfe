"""The reference's `generate` under injected noise, every canvas on its way recorded, and a network to run it on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from parity.reference import reference
from torch import Tensor

from dgemma.config import FULL, SLIDING, GenerationConfig, ModelConfig
from dgemma.decoding import blocks
from dgemma.decoding.events import Block, Finished, Step
from dgemma.decoding.noise import Noise
from dgemma.model.network import DiffusionGemma
from dgemma.picture import Placed

CONFIG = ModelConfig(
    vocab_size=48,
    hidden_size=24,
    intermediate_size=32,
    moe_intermediate_size=12,
    num_experts=4,
    top_k_experts=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=8,
    num_global_key_value_heads=1,
    global_head_dim=16,
    layer_types=(SLIDING, FULL),
    sliding_window=7,
    canvas_length=8,
    max_position_embeddings=128,
    dtype="float32",
)
OPTIONS = GenerationConfig(
    max_new_tokens=24,
    max_denoising_steps=14,
    entropy_bound=0.2,
    confidence_threshold=0.1,
    eos_token_id=(1, 39, 20),
)


def calm(model: DiffusionGemma) -> None:
    """Weights under which canvases settle one by one and rounding dies out instead of growing from step to step.

    A position mostly believes its own token, the more so the longer that token's embedding: doubtful ones are drawn
    anew until they fit. Feedback through self-conditioning is weak, so what differs in the last bit stays there.
    """
    size = model.config.vocab_size
    order = torch.randperm(size, generator=torch.Generator().manual_seed(3))
    model.embed_tokens.weight.mul_(torch.linspace(0.3, 0.75, size)[order][:, None])
    model.self_conditioning.down_proj.weight.mul_(0.1)
    for layer in model.layers:
        layer.post_attention_layernorm.weight.mul_(0.6)
        layer.post_feedforward_layernorm.weight.mul_(0.6)


@dataclass
class Trajectory:
    """One row: for each block, [(canvas, best)] after every step; all new tokens, cut behind the end token."""

    blocks: list[list[tuple[list[int], list[int]]]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    tokens_per_forward: float = math.nan
    converged: list[bool] = field(default_factory=list)

    @property
    def steps(self) -> list[int]:
        return [len(block) for block in self.blocks]


def noises(seed: int, rows: int, config: ModelConfig = CONFIG) -> list[Noise]:
    return [Noise(1000 * seed + row, config.vocab_size, config.canvas_length) for row in range(rows)]


def our_trajectories(
    model: DiffusionGemma,
    prompts: Sequence[Tensor],
    options: GenerationConfig,
    noise: Sequence[Noise],
    pictures: Sequence[Sequence[Placed]] | None = None,
) -> list[Trajectory]:
    """What `dgemma.decoding.blocks.generate` does, a row."""
    shown = pictures or [()] * len(prompts)
    rows = zip(prompts, noise, shown, strict=True)
    requests = [blocks.Request(prompt, options, n, pictures=tuple(placed)) for prompt, n, placed in rows]
    rows = [Trajectory() for _ in requests]
    for event in blocks.generate(model, requests):
        match event:
            case Step():
                row = rows[event.row]
                if event.block == len(row.blocks):
                    row.blocks.append([])
                assert event.step == len(row.blocks[event.block]) + 1
                row.blocks[event.block].append((event.canvas.tolist(), event.best.tolist()))
            case Block():
                rows[event.row].tokens += event.tokens
                rows[event.row].converged.append(event.converged)
            case Finished():
                rows[event.row].tokens_per_forward = event.tokens_per_forward
                assert event.tokens == rows[event.row].tokens
                assert event.steps == rows[event.row].steps
    return rows


def reference_trajectories(
    theirs: Any, prompts: Tensor, options: GenerationConfig, noise: Sequence[Noise], **given: Tensor
) -> list[Trajectory]:
    """What the reference's `generate` does with prompts [B, T], what else is given, and these draws."""
    blocks, out = reference.generate(theirs, prompts, options, noise, **given)
    rows = []
    for i, own in enumerate(blocks):
        new = out.sequences[i, prompts.shape[1] :].tolist()
        ends = [j for j, token in enumerate(new) if token in options.eos_token_id]
        steps = [list(zip(block.canvas.tolist(), block.best.tolist(), strict=True)) for block in own]
        tokens = new[: ends[0] + 1] if ends else new
        rows.append(Trajectory(steps, tokens, float(out.tokens_per_forward[i])))
    return rows
