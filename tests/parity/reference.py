"""The public reference beside our network, with the same random weights: the oracle of the parity tests."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dgemma.checkpoints.names import stored_name
from dgemma.config import FULL, SLIDING, ModelConfig, Rope
from dgemma.model.network import DiffusionGemma

transformers = pytest.importorskip("transformers", reason="transformers, the reference, is not installed")
reference = pytest.importorskip("dgemma.conformance.reference")
VISION = reference.TOWER


def random_config(rng: random.Random) -> ModelConfig:
    """A tiny network of any shape that the family allows."""
    kinds = [rng.choice((SLIDING, SLIDING, FULL)) for _ in range(rng.randint(0, 3))]
    heads = rng.choice((2, 4))
    experts = rng.choice((2, 3, 6))
    return ModelConfig(
        vocab_size=rng.choice((61, 130)),
        hidden_size=rng.choice((24, 40)),
        intermediate_size=rng.choice((16, 36)),
        moe_intermediate_size=rng.choice((8, 20)),
        num_experts=experts,
        top_k_experts=rng.randint(1, experts),
        num_attention_heads=heads,
        num_key_value_heads=rng.choice([k for k in (1, 2, 4) if heads % k == 0]),
        head_dim=rng.choice((8, 12)),
        num_global_key_value_heads=rng.choice([k for k in (1, 2, 4) if heads % k == 0]),
        global_head_dim=rng.choice((16, 24)),
        layer_types=(*kinds, FULL),
        sliding_window=rng.choice((3, 8, 13)),
        canvas_length=rng.choice((4, 7, 16)),
        max_position_embeddings=512,
        rms_norm_eps=rng.choice((1e-6, 1e-3)),
        final_logit_softcapping=rng.choice((3.0, 30.0)),
        rope_full=Rope(rng.choice((1e4, 1e6)), "proportional", rng.choice((0.25, 0.5, 1.0))),
        dtype="float32",
    )


@torch.no_grad()
def randomise(model: DiffusionGemma, seed: int) -> None:
    """Fills every tensor with its own draws: no norm, scale or scalar is 1, and the two modes' scalars differ."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if name == "embed_tokens.weight":
            tensor.normal_(0, 1, generator=generator)
        elif tensor.dim() > 1:
            tensor.normal_(0, tensor.shape[-1] ** -0.5, generator=generator)
        else:
            tensor.uniform_(0.5, 1.4, generator=generator)


def make_reference(
    config: ModelConfig, seed: int, adjust: Callable[[DiffusionGemma], None] | None = None
) -> tuple[DiffusionGemma, Any]:
    """(ours, theirs): our network with random weights, after `adjust`, and transformers' with the same."""
    ours = DiffusionGemma(config).eval()
    randomise(ours, seed)
    if adjust:
        with torch.no_grad():
            adjust(ours)
    return ours, reference_of(ours)


def reference_of(ours: DiffusionGemma) -> Any:
    """transformers' network with the weights of ours, in float32."""
    weights = {stored_name(name): tensor for name, tensor in ours.state_dict().items()}
    return reference.build(ours.config.to_dict(), weights)


def tokens(shape: tuple[int, ...], vocabulary: int, seed: int) -> Tensor:
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def reference_logits(theirs: Any, prompt: Tensor, canvas: Tensor, previous: Tensor | None = None) -> Tensor:
    """float32 [B, C, V] of a canvas behind a prompt [B, T], by way of the cache that `generate` makes."""
    cache = transformers.DynamicCache(config=theirs.config.get_text_config(decoder=True))
    theirs.model.encoder(input_ids=prompt, past_key_values=cache)
    out = theirs(decoder_input_ids=canvas, past_key_values=cache, self_conditioning_logits=previous)
    return out.logits


@torch.no_grad()
def reference_causal_logits(theirs: Any, prompt: Tensor) -> Tensor:
    """float32 [B, T, V]: the autoregressive logits of the causal mode."""
    out = theirs.model.encoder(input_ids=prompt)
    cap = theirs.final_logit_softcapping
    return cap * torch.tanh(theirs.lm_head(out.last_hidden_state).float() / cap)


@torch.no_grad()
def our_logits(ours: DiffusionGemma, prompt: Tensor, canvas: Tensor, previous: Tensor | None = None) -> Tensor:
    cache = ours.new_cache(len(prompt))
    ours.encode(prompt, cache)
    return ours.denoise(canvas, cache, previous)


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, as a share of the logits' scale: the root mean square of the reference's."""
    return float((ours - theirs).abs().max() / theirs.square().mean().sqrt())
