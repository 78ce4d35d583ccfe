"""The training loop: it learns, adds gradients up, survives being killed, and stops at nonsense."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from array import array
from pathlib import Path

import pytest
import torch

from dgemma.config import FULL, SLIDING, ModelConfig
from dgemma.model.network import DiffusionGemma
from dgemma.train.data import Example, Target
from dgemma.train.log import RunLog
from dgemma.train.loop import Run, _draw, _gradients, read_state, train
from dgemma.train.optim import MuonAdam, orthogonalise
from dgemma.train.options import TrainOptions
from dgemma.train.sources import FileSource, Mixture


def model() -> DiffusionGemma:
    return DiffusionGemma(
        ModelConfig(
            vocab_size=24,
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


def copying() -> Mixture:
    """The answer is the prompt, of three to six tokens, which takes one or two canvases."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for i in range(200):
        text = torch.randint(8, 24, (3 + i % 4,), generator=generator).tolist()
        found.append(Example(array("i", [2, *text, 5, *text, 1]), (Target(len(text) + 2, 2 * len(text) + 3, True),)))
    return Mixture([FileSource(found, seed=0)], [1.0], seed=0)


OPTIONS = TrainOptions(
    steps=120, batch=8, canvases=2, optimizer="muon", learning_rate=3e-3, warmup=10, ema=0.9, router=True, save_every=10
)


def run_to(directory: Path, options: TrainOptions, network: DiffusionGemma | None = None) -> Run:
    network = network or model()
    weights = dict(network.named_parameters())
    run = Run(network, options, weights)
    state = read_state(directory)
    if state:
        run.resume(state)
    with RunLog(directory, options.steps, run.step, out=open(os.devnull, "w")) as log:
        train(run, copying(), directory, log, {})
    return run


@pytest.mark.parametrize("rollout", [0.0, 0.5])
def test_products_in_bfloat16_leave_every_weight_its_gradient(rollout: float) -> None:
    """Whatever passes without gradients come before: the same direction as in float32, and float32."""
    found = []
    for autocast in (False, True):
        network = model()
        options = TrainOptions(batch=16, rollout=rollout, rollout_steps=2, autocast=autocast, router=True)
        run = Run(network, options, dict(network.named_parameters()))
        batch, drawn = _draw(run, copying().batch(0, 16))
        gradients, figures = _gradients(run, batch, drawn)
        found.append((gradients, figures["loss"]))
    (exact, loss), (cast, near) = found
    assert near == pytest.approx(loss, rel=0.01)
    assert near != loss
    for name, gradient in exact.items():
        assert cast[name].dtype == torch.float32
        if gradient.norm() > 1e-4:
            assert torch.cosine_similarity(cast[name].flatten(), gradient.flatten(), dim=0) > 0.9, name


def entries(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    state = read_state(directory)
    assert state
    moments = {f"{key}.{n}": t for key in ("velocity", "mean", "square") for n, t in state["optimiser"][key].items()}
    return state["weights"] | {f"average.{n}": t for n, t in state["average"].items()} | moments


def assert_identical(one: Path, two: Path) -> None:
    left, right = weights(one), weights(two)
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different


def test_it_learns(tmp_path: Path) -> None:
    run_to(tmp_path, OPTIONS)
    log = entries(tmp_path)
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]
    assert log[-1]["causal"] < log[0]["causal"]
    assert log[-1]["level/3"] > log[-1]["level/0"], "more noise is harder"


@pytest.mark.parametrize("micro", [1, 3, 8])
def test_gradients_add_up_to_those_of_the_whole_batch(tmp_path: Path, micro: int) -> None:
    whole = run_to(tmp_path / "whole", TrainOptions(steps=3, batch=8, canvases=2, clip=0, learning_rate=1e-2))
    parts = run_to(
        tmp_path / "parts", TrainOptions(steps=3, batch=8, canvases=2, clip=0, learning_rate=1e-2, micro_batch=micro)
    )
    for name, weight in whole.weights.items():
        torch.testing.assert_close(parts.weights[name], weight, atol=2e-4, rtol=1e-3)


def test_killed_at_any_moment_it_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """A process that trains is killed with SIGKILL three times and started again; nothing differs in the end."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    run_to(straight, OPTIONS)
    code = (
        "import sys, torch; torch.set_num_threads(1); sys.path.insert(0, '.');"
        "from tests.train.test_loop import *; run_to(Path(sys.argv[1]), OPTIONS)"
    )
    kills = 0
    while True:
        process = subprocess.Popen([sys.executable, "-c", code, str(killed)])
        before = read_state(killed)
        reached = before["step"] if before else 0
        while process.poll() is None and kills < 3:
            state = killed / "state.pt"
            if state.exists() and (read_state(killed) or {"step": 0})["step"] > reached:
                time.sleep(0.03 * kills)  # somewhere between two checkpoints, or within one
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.005)
        if process.wait() == 0:
            break
    assert kills == 3
    assert_identical(straight, killed)
    steps = [entry["step"] for entry in entries(killed)]
    assert steps == sorted(set(steps)), "no step is told twice"


def test_more_steps_go_on_from_the_end(tmp_path: Path) -> None:
    run_to(tmp_path, TrainOptions(steps=5))
    assert run_to(tmp_path, TrainOptions(steps=8)).step == 8


def test_a_loss_that_is_no_number_stops_before_it_does_harm(tmp_path: Path) -> None:
    run_to(tmp_path, TrainOptions(steps=2))
    good = weights(tmp_path)
    broken = model()
    state = read_state(tmp_path)
    assert state
    state["weights"]["norm.weight"].fill_(float("nan"))
    run = Run(broken, TrainOptions(steps=4), dict(broken.named_parameters()))
    run.resume(state)
    with (
        RunLog(tmp_path, 4, 2, out=open(os.devnull, "w")) as log,
        pytest.raises(ValueError, match="step 3: the loss is nan"),
    ):
        train(run, copying(), tmp_path, log, {})
    assert all(torch.equal(tensor, weights(tmp_path)[name]) for name, tensor in good.items())


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    run = run_to(tmp_path, TrainOptions(steps=2))
    good = (tmp_path / "state.pt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(good) // 2, hard))
    try:
        with pytest.raises(OSError, match=r"cannot write the checkpoint of step 2 .*the last one is kept"):
            run.save(tmp_path, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert (tmp_path / "state.pt").read_bytes() == good
    assert not (tmp_path / "state.pt.new").exists()
    assert errno.EFBIG


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "state.pt").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"state\.pt is damaged"):
        read_state(tmp_path)


def test_evaluation_sees_the_average_and_leaves_the_weights(tmp_path: Path) -> None:
    network = model()
    run = Run(network, TrainOptions(steps=5, ema=0.9, learning_rate=0.1), dict(network.named_parameters()))
    seen = []

    def evaluate() -> dict[str, float]:
        seen.append(network.norm.weight.detach().clone())
        return {"exact/it": 1.0}

    with RunLog(tmp_path, 5, out=open(os.devnull, "w")) as log:
        train(run, copying(), tmp_path, log, {}, evaluate)
    assert torch.equal(seen[0], run.average["norm.weight"])
    assert not torch.equal(seen[0], network.norm.weight)


def test_adam_equals_torchs() -> None:
    ours, theirs = torch.randn(5, 3).requires_grad_(), None
    theirs = ours.detach().clone().requires_grad_()
    mine = MuonAdam({"w": ours}, adam_rate=0.01)
    reference = torch.optim.Adam([theirs], lr=0.01, betas=(0.9, 0.98), eps=1e-8)
    for i in range(20):
        grad = torch.randn(5, 3, generator=torch.Generator().manual_seed(i))
        theirs.grad = grad.clone()
        reference.step()
        mine.step({"w": grad})
    torch.testing.assert_close(ours, theirs)


def test_bfloat16_weights_have_float32_masters() -> None:
    """Steps too small for bfloat16 add up in the master, and survive a checkpoint."""
    weight = torch.ones(4, dtype=torch.bfloat16)
    optimiser = MuonAdam({"w": weight}, adam_rate=1e-4)
    for _ in range(60):
        optimiser.step({"w": torch.ones(4)})
    assert optimiser.masters["w"].max() < 0.995
    assert torch.equal(weight, optimiser.masters["w"].bfloat16())
    again = MuonAdam({"w": weight.clone()}, adam_rate=1e-4)
    again.load_state_dict(optimiser.state_dict())
    assert torch.equal(again.masters["w"], optimiser.masters["w"])


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 8, 32), (2, 32, 8)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrices))
    assert values.min() > 0.2, "Gaussian matrices of this size have singular values down to 0.01 of the largest"
    assert values.max() < 1.4
