"""A deeper model that begins as the one it was made of."""

import random

import pytest
import torch

from dgemma.train.grow import grown
from tests.parity.reference import make_reference, random_config


@pytest.mark.parametrize("seed", range(4))
def test_a_deeper_model_says_the_same_and_all_of_it_learns(seed: int) -> None:
    model, _ = make_reference(random_config(random.Random(seed)), seed)
    config = model.config
    deeper = grown(model, 2 * config.num_hidden_layers + 1)
    assert deeper.config.num_hidden_layers == len(deeper.layers) == 2 * config.num_hidden_layers + 1
    tokens = torch.randint(config.vocab_size, (1, 11), generator=torch.Generator().manual_seed(seed))
    canvas = torch.randint(config.vocab_size, (1, config.canvas_length), generator=torch.Generator().manual_seed(seed))
    found = []
    for each in (model, deeper):
        cache = each.new_cache()
        read = each.encode(tokens, cache, logits=True)
        found.append((read[0], each.denoise(canvas, cache)))
    for deep, shallow in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(deep, shallow, atol=1e-4, rtol=1e-4)
    found[1][1].square().sum().backward()
    added = [layer for layer in deeper.layers if not layer.post_attention_layernorm.weight.any()]
    assert len(added) == config.num_hidden_layers + 1
    assert all(layer.post_feedforward_layernorm.weight.grad.norm() > 0 for layer in added)


def test_a_model_cannot_shrink() -> None:
    model, _ = make_reference(random_config(random.Random(0)), 0)
    with pytest.raises(ValueError, match="it can only grow"):
        grown(model, model.config.num_hidden_layers - 1)
