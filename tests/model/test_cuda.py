"""The same network on a CUDA device: `make test-gpu`."""

import random

import pytest
import torch

import dgemma
from dgemma.model.network import DiffusionGemma
from tests.parity.reference import random_config, randomise

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PUZZLE = "53..7.912 6..195..8 198...567 .5.76..23 4.68.3.91 7.39.4..6 9615..284 2.74196.5 3..28.1.9"


@pytest.mark.parametrize("seed", range(6))
def test_float32_logits_equal_those_on_the_cpu(seed: int) -> None:
    model = DiffusionGemma(random_config(random.Random(seed))).eval().requires_grad_(False)
    randomise(model, seed)
    vocabulary, length = model.config.vocab_size, model.config.canvas_length
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(vocabulary, (2, 21), generator=generator)
    canvas = torch.randint(vocabulary, (2, length), generator=generator)
    found = []
    for device in ("cpu", "cuda"):
        model.to(device)
        cache = model.new_cache(2)
        model.encode(prompt, cache)
        first = model.denoise(canvas.to(device), cache)
        found.append(torch.stack((first, model.denoise(canvas.to(device), cache, first / 0.8))).cpu())
    assert (found[1] - found[0]).abs().max() <= 1e-3 * found[0].square().mean().sqrt()


def test_the_embedded_model_solves_there() -> None:
    lm = dgemma.load("sudoku", device="cuda")
    assert lm.model.device.type == "cuda"
    assert lm.task is not None
    assert lm.task.check(PUZZLE, lm.generate(PUZZLE).text).right
    assert lm.generate(lm.tokens(PUZZLE), autoregressive=True, max_new_tokens=3).steps == [1, 1, 1]
