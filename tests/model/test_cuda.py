"""The same network on a CUDA device: `make test-gpu`."""

import json
import random

import pytest
import torch

import dgemma
from dgemma.bench.shapes import SHAPES
from dgemma.config import GenerationConfig
from dgemma.decoding.blocks import Request, generate
from dgemma.decoding.events import Step
from dgemma.decoding.noise import Noise
from dgemma.model.network import DiffusionGemma
from dgemma.train.options import Recipe, TrainOptions
from dgemma.train.run import run
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


def test_replayed_steps_are_the_called_ones(monkeypatch) -> None:
    """Of a bfloat16 model, whose experts need no word from the host: two rows that part ways, and two blocks."""
    shape = SHAPES["small"]
    model = DiffusionGemma(shape.config).init_weights(seed=0).to("cuda", torch.bfloat16).eval()
    assert not model.waits
    length, size = model.config.canvas_length, model.config.vocab_size
    found = []
    for replayed in (True, False):
        monkeypatch.setattr(DiffusionGemma, "waits", not replayed)
        requests = []
        for row, blocks in enumerate((2, 1)):
            prompt = torch.randint(size, (20 + row,), generator=torch.Generator().manual_seed(row))
            options = GenerationConfig(max_new_tokens=blocks * length, max_denoising_steps=9, eos_token_id=())
            requests.append(Request(prompt, options, Noise(row, size, length)))
        steps = [e for e in generate(model, requests) if isinstance(e, Step)]
        found.append([(e.row, e.block, e.step, e.canvas.tolist(), e.best.tolist()) for e in steps])
    assert found[0] == found[1]
    assert len(found[0]) > 20


def test_bfloat16_logits_are_near_those_on_the_cpu() -> None:
    model = DiffusionGemma(SHAPES["small"].config).init_weights(seed=0).bfloat16().eval().requires_grad_(False)
    canvas = torch.randint(512, (3, model.config.canvas_length), generator=torch.Generator().manual_seed(0))
    found = []
    for device in ("cpu", "cuda"):
        model.to(device)
        cache = model.new_cache(3)
        model.encode(canvas[:, :20], cache)
        found.append(model.denoise(canvas.to(device), cache).cpu())
    assert (found[1] - found[0]).square().mean() < 0.05**2 * found[0].square().mean()


def test_training_there_follows_the_cpu(tmp_path) -> None:
    """The losses of a few steps, of examples of many lengths that are filled up and masked there."""
    recipe = Recipe("tiny", {"arithmetic": 1.0, "tables": 1.0}, options=TrainOptions(steps=3, batch=6, clip=0.1))
    losses = []
    for device in ("cpu", "cuda"):
        run(recipe, tmp_path / device, device)
        lines = (tmp_path / device / "log.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_the_embedded_model_solves_there() -> None:
    lm = dgemma.load("sudoku", device="cuda")
    assert lm.model.device.type == "cuda"
    assert lm.task is not None
    assert lm.task.check(PUZZLE, lm.generate(PUZZLE).text).right
    assert lm.generate(lm.tokens(PUZZLE), autoregressive=True, max_new_tokens=3).steps == [1, 1, 1]
