"""The small trainer: it learns, it resumes, it stops at nonsense."""

import json
from pathlib import Path

import pytest
import torch

from dgemma.config import FULL, SLIDING, ModelConfig
from dgemma.model.network import DiffusionGemma
from dgemma.train.optim import orthogonalise
from dgemma.train.pretrain import Schedule, train


def _model() -> DiffusionGemma:
    return DiffusionGemma(
        ModelConfig(
            vocab_size=16,
            hidden_size=32,
            intermediate_size=32,
            moe_intermediate_size=16,
            num_experts=4,
            top_k_experts=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            num_global_key_value_heads=1,
            global_head_dim=16,
            layer_types=(SLIDING, FULL),
            sliding_window=16,
            canvas_length=4,
        )
    ).init_weights(0)


def _copying(seed: int):
    """The answer is the prompt."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        prompt = torch.randint(16, (16, 4), generator=generator)
        yield prompt, prompt.clone()


def _log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_it_learns_and_continues_where_it_stopped(tmp_path: Path) -> None:
    schedule = Schedule(minutes=0.05, warmup=10, save_minutes=0.01)
    train(_model(), _copying, schedule, tmp_path, lambda model: {})
    first = _log(tmp_path)
    assert first[-1]["loss"] < first[0]["loss"]
    assert first[-1]["schedule"]["minutes"] == 0.05

    longer = Schedule(minutes=0.08, warmup=10, save_minutes=0.01)
    train(_model(), _copying, longer, tmp_path, lambda model: {"score": 1.0})
    last = _log(tmp_path)[-1]
    assert last["step"] > first[-1]["step"]
    assert last["minutes"] >= 0.08
    assert last["score"] == 1.0
    assert last["loss"] < first[0]["loss"]


def test_a_loss_that_is_no_number_keeps_the_last_good_state(tmp_path: Path) -> None:
    model = _model()
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="the loss is nan at step 1"):
        train(model, _copying, Schedule(minutes=1), tmp_path, lambda model: {})
    assert not (tmp_path / "state.pt").exists()


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 8, 32), (2, 32, 8)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrices))
    assert values.min() > 0.2, "Gaussian matrices of this size have singular values down to 0.01 of the largest"
    assert values.max() < 1.4
