"""What each mode computes, and what it leaves out."""

import random

import torch

from dgemma.model.network import DiffusionGemma
from tests.parity.reference import random_config, randomise


def _model() -> DiffusionGemma:
    model = DiffusionGemma(random_config(random.Random(2))).eval()
    randomise(model, 0)
    return model


def _called(model: DiffusionGemma) -> set[str]:
    called: set[str] = set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    return called


def test_encode_skips_what_nobody_reads() -> None:
    model = _model()
    called = _called(model)
    tokens = torch.arange(9)[None]
    with torch.inference_mode():
        assert model.encode(tokens, model.new_cache()) is None
    last = f"layers.{len(model.layers) - 1}"
    in_last = {name for name in called if name.startswith(f"{last}.")}
    assert in_last == {
        f"{last}.{part}" for part in ("input_layernorm", "self_attn.k_proj", "self_attn.k_norm", "self_attn.v_norm")
    }
    assert "norm" not in called
    assert not any("self_conditioning" in name for name in called)

    called.clear()
    with torch.inference_mode():
        logits = model.encode(tokens, model.new_cache(), logits=True)
    assert logits is not None
    assert logits[0].shape == (9, model.config.vocab_size)
    assert {f"{last}.experts", f"{last}.self_attn.o_proj", "norm"} <= called


def test_encoding_nothing_is_nothing() -> None:
    model = _model()
    cache = model.new_cache(2)
    with torch.inference_mode():
        logits = model.encode([torch.empty(0, dtype=torch.int64), torch.tensor([3, 4])], cache, logits=True)
    assert cache.lengths == [0, 2]
    assert logits is not None
    assert [tuple(part.shape) for part in logits] == [(0, model.config.vocab_size), (2, model.config.vocab_size)]
