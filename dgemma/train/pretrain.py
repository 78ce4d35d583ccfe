"""A small model from nothing: a loop over batches of (prompt, answer) tokens, with checkpoints that resume it."""

import copy
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from dgemma.model.network import DiffusionGemma
from dgemma.train.objective import corrupt, diffusion_loss
from dgemma.train.optim import MuonAdam

Batches = Callable[[int], Iterator[tuple[Tensor, Tensor]]]
"""From a seed to batches without end: prompts int64 [B, S] and clean canvases int64 [B, C]."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: rates warm up, hold, and fall to a twentieth over the last `decay` share of the time."""

    minutes: float
    canvases: int = 2
    warmup: int = 100
    decay: float = 0.5
    muon_lr: float = 0.02
    adam_lr: float = 2e-3
    ema: float = 0.999
    save_minutes: float = 10.0

    def factor(self, step: int, elapsed: float) -> float:
        left = max(0.0, 1 - elapsed / self.minutes)
        return min(1.0, (step + 1) / self.warmup) * max(0.05, min(1.0, left / self.decay))


def train(
    model: DiffusionGemma,
    batches: Batches,
    schedule: Schedule,
    out: Path,
    evaluate: Callable[[DiffusionGemma], dict[str, float]],
) -> DiffusionGemma:
    """Trains until the schedule's minutes are spent, earlier runs in `out` counted in; returns the averaged model.

    Each save leaves out/state.pt (to resume from) and a line of measurements in out/log.jsonl.
    """
    out.mkdir(parents=True, exist_ok=True)
    state_file = out / "state.pt"
    average = copy.deepcopy(model).requires_grad_(False)
    optimiser = make_optimiser(model, schedule)
    step, spent = 0, 0.0
    if state_file.exists():
        state = torch.load(state_file, map_location=model.device, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimiser.load_state_dict(state["optimiser"])
        step, spent = state["step"], state["minutes"]
    generator = torch.Generator().manual_seed(step)
    rates = [schedule.muon_lr, schedule.adam_lr]
    started = saved = time.monotonic()
    losses: list[float] = []
    for prompt, clean in batches(step):
        minutes = spent + (time.monotonic() - started) / 60
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = rate * schedule.factor(step, minutes)
        drawn = corrupt(clean.repeat_interleave(schedule.canvases, 0), model.config.vocab_size, generator)
        loss = diffusion_loss(model, prompt, drawn).mean()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise ValueError(f"the loss is {losses[-1]} at step {step + 1}; the last saved state is in {out}")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        follow(average, model, min(schedule.ema, (step + 1) / (step + 10)))
        step += 1
        done = minutes >= schedule.minutes
        if done or time.monotonic() - saved > 60 * schedule.save_minutes:
            entry = {"step": step, "minutes": round(minutes, 2), "loss": sum(losses) / len(losses), **evaluate(average)}
            save_state(state_file, model, average, optimiser, step, minutes)
            with (out / "log.jsonl").open("a") as log:
                log.write(json.dumps(entry | ({"schedule": asdict(schedule)} if done else {})) + "\n")
            print(json.dumps(entry), flush=True)
            saved, losses = time.monotonic(), []
        if done:
            break
    return average


def make_optimiser(model: DiffusionGemma, schedule: Schedule) -> MuonAdam:
    """Muon for the matrices between hidden states; Adam for embedding, router and norms."""
    matrix = lambda name, p: p.dim() >= 2 and "embed" not in name and "router" not in name  # noqa: E731
    named = list(model.named_parameters())
    matrices = [p for name, p in named if matrix(name, p)]
    others = [p for name, p in named if not matrix(name, p)]
    return MuonAdam(matrices, others, schedule.muon_lr, schedule.adam_lr)


@torch.no_grad()
def follow(average: DiffusionGemma, model: DiffusionGemma, keep: float) -> None:
    """Moves the averaged weights a little towards the model's."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - keep)


def save_state(
    path: Path, model: DiffusionGemma, average: DiffusionGemma, optimiser: MuonAdam, step: int, minutes: float
) -> None:
    """Writes the state beside the old one and then takes its place, so that a kill leaves one of the two whole."""
    state = {"model": model.state_dict(), "average": average.state_dict(), "optimiser": optimiser.state_dict()}
    torch.save(state | {"step": step, "minutes": minutes}, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)
