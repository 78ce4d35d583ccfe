"""The training loop: batch, loss, step, log, and now and then a checkpoint and an evaluation.

Everything random is drawn from (seed, step), so a run that was killed and resumed goes on bit for bit (CPU, float32).
"""

import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dgemma.model.network import DiffusionGemma
from dgemma.train.data import Example
from dgemma.train.log import RunLog
from dgemma.train.memory import checkpoint_layers
from dgemma.train.objective import Batch, Corruption, corrupt, diffusion_loss
from dgemma.train.optim import MuonAdam
from dgemma.train.options import TrainOptions
from dgemma.train.rollout import roll_out
from dgemma.train.sources import Mixture, assemble, batches

STATE = "state.pt"
FLOOR = 0.05
"""Share of the peak rate that the cosine falls to."""

Evaluate = Callable[[], Mapping[str, float]]


@dataclass
class Run:
    """A model on its way: the weights that move, their average, the optimiser, and how far it is."""

    model: DiffusionGemma
    options: TrainOptions
    weights: dict[str, nn.Parameter]
    step: int = 0
    minutes: float = 0.0
    average: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        o = self.options
        matrices = frozenset(name for name, p in self.weights.items() if o.optimizer == "muon" and is_matrix(name, p))
        self.optimiser = MuonAdam(self.weights, matrices, muon_rate=o.muon_rate, adam_rate=o.learning_rate)
        if o.ema:
            self.average = {name: p.detach().float().clone() for name, p in self.weights.items()}
        if o.checkpointing:
            checkpoint_layers(self.model)

    @property
    def done(self) -> bool:
        return self.step >= self.options.steps or 0 < self.options.minutes <= self.minutes

    @property
    def factor(self) -> float:
        """Share of the peak rates for the coming step: warm-up, then a cosine over the steps or minutes of the run."""
        o = self.options
        progress = max(self.step / max(1, o.steps), self.minutes / o.minutes if o.minutes else 0.0)
        cosine = FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * min(1.0, progress))) / 2
        return min(1.0, (self.step + 1) / (o.warmup + 1)) * cosine

    def save(self, directory: Path, recipe: Mapping[str, Any]) -> None:
        """Writes the state beside the old one, which it then replaces: one of the two is whole at any moment."""
        state = {"step": self.step, "minutes": self.minutes, "recipe": dict(recipe), "average": self.average}
        state |= {"weights": {n: p.detach() for n, p in self.weights.items()}, "optimiser": self.optimiser.state_dict()}
        new = directory / f"{STATE}.new"
        try:
            with new.open("wb") as file:
                torch.save(state, file)
                os.fsync(file.fileno())
            os.replace(new, directory / STATE)
        except (OSError, RuntimeError) as error:  # torch's writer raises the latter on a full disk
            new.unlink(missing_ok=True)
            kept = "the last one is kept" if (directory / STATE).exists() else "there is none yet"
            raise OSError(f"cannot write the checkpoint of step {self.step} to {directory}: {error}; {kept}") from None

    @torch.no_grad()
    def resume(self, state: Mapping[str, Any]) -> None:
        for name, parameter in self.weights.items():
            parameter.copy_(state["weights"][name])
        for name, tensor in self.average.items():
            tensor.copy_(state["average"].get(name, self.weights[name]))
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.minutes = state["step"], state["minutes"]

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model with its averaged weights, if there are any, for evaluation and for the result."""
        own = {name: self.weights[name].detach().clone() for name in self.average}
        with torch.no_grad():
            for name, tensor in self.average.items():
                self.weights[name].copy_(tensor)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in own.items():
                    self.weights[name].copy_(tensor)


def read_state(directory: Path) -> dict[str, Any] | None:
    """What an earlier run left to go on from; ValueError for a damaged file."""
    path = directory / STATE
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is damaged ({error}): remove it to begin again") from None


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon should move it: matrices between hidden states, not embedding or router."""
    return parameter.dim() >= 2 and "embed" not in name and "router" not in name


def train(
    run: Run,
    mixture: Mixture,
    directory: Path,
    log: RunLog,
    recipe: Mapping[str, Any],
    evaluate: Evaluate | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Takes a run to its end, or until it is `stopped`. Leaves checkpoints in `directory`, with `recipe` in them."""
    o = run.options
    begun, before = time.monotonic(), run.minutes
    with batches(mixture, run.step, o.batch, o.workers) as source:
        while not run.done:
            batch, drawn = _draw(run, next(source))
            factor = run.factor
            try:
                figures = take_step(run, batch, drawn)
            except ArithmeticError as error:
                raise ValueError(f"step {run.step + 1}: {error}; the last checkpoint is in {directory}") from None
            run.step += 1
            run.minutes = before + (time.monotonic() - begun) / 60
            _follow(run)
            log.record(run.step, figures | {"rate": factor, "examples": o.batch})
            if run.done or stopped() or run.step % o.save_every == 0:
                run.save(directory, recipe)
            if evaluate and (run.done or (o.eval_every and run.step % o.eval_every == 0)):
                with run.averaged():
                    log.evaluated(run.step, evaluate())
            if stopped() and not run.done:
                raise KeyboardInterrupt


def _draw(run: Run, found: list[Example]) -> tuple[Batch, Corruption]:
    """The canvases of a step and their noise, drawn from the seed and the step's number."""
    o, config = run.options, run.model.config
    rng = random.Random(f"{o.seed}/{run.step}")
    batch = assemble(found, o.canvases, config.canvas_length, config.eos_token_id[0], rng)
    draws = np.random.SeedSequence([o.seed, run.step]).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(draws[0] >> np.uint64(1)))
    return batch, corrupt(batch.clean, config.vocab_size, generator, o.conditioning, o.infill, o.exponent)


def take_step(run: Run, batch: Batch, drawn: Corruption) -> dict[str, float]:
    """Moves the weights by one batch; its losses, and the norm of its gradient before clipping.

    ArithmeticError, before any weight is touched, if these are no numbers.
    """
    gradients, figures = _gradients(run, batch, drawn)
    norm = float(torch.nn.utils.get_total_norm(gradients.values()))
    if not math.isfinite(figures["loss"] + norm):
        raise ArithmeticError(
            f"the loss is {figures['loss']:.4g} and the gradient's norm {norm:.4g}; no weight was changed by it. "
            "Lower the learning rate"
        )
    if run.options.clip and norm > run.options.clip:
        torch._foreach_mul_(list(gradients.values()), run.options.clip / norm)
    run.optimiser.step(gradients, run.factor)
    return figures | {"norm": norm}


def _gradients(run: Run, batch: Batch, drawn: Corruption) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The gradients of a step, float32 by name, over as many passes as its examples need; and its losses."""
    o = run.options
    count = len(batch.clean) // o.canvases
    size = o.micro_batch or count
    tokens = sum(stop - start for _, start, stop in batch.answers)
    gradients: dict[str, Tensor] = {}
    rows, causal_sum = [], 0.0
    for first in range(0, count, size):
        part, drawn_part = _part(batch, drawn, first, min(count, first + size), o.canvases)
        part = part.to(run.model.device)
        # Without its cache: that would hand what was cast in a pass without gradients to the one with them.
        with torch.autocast(run.model.device.type, torch.bfloat16, enabled=o.autocast, cache_enabled=False):
            if o.rollout:
                drawn_part = roll_out(run.model, part, drawn_part, o, run.step)
            drawn_part = drawn_part.to(run.model.device)
            loss, causal = diffusion_loss(run.model, part, drawn_part, o.causal > 0, o.leave_one_out)
        total = loss.sum() / batch.clean.numel()
        if causal is not None:
            total = total + o.causal * causal.sum() / tokens
            causal_sum += float(causal.detach().sum())
        total.backward()
        rows.append(loss.detach().mean(1).cpu())
        for name, parameter in run.weights.items():
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradients[name] = gradients[name].add_(grad) if name in gradients else grad.float()
            parameter.grad = None
    losses = torch.cat(rows)
    figures = {"loss": float(losses.mean())} | ({"causal": causal_sum / tokens} if o.causal > 0 else {})
    quarter = (drawn.level * 4).long().clamp_(max=3).cpu()
    figures |= {f"level/{i}": float(losses[quarter == i].mean()) for i in quarter.unique().tolist()}
    return gradients, figures


def _part(batch: Batch, drawn: Corruption, first: int, end: int, canvases: int) -> tuple[Batch, Corruption]:
    """Examples `first` to `end` of a batch, with their canvases and answers."""
    rows = slice(first * canvases, end * canvases)
    owner = [example - first for example in batch.owner[rows]]
    answers = [(example - first, start, stop) for example, start, stop in batch.answers if first <= example < end]
    pictures = batch.pictures[first:end]
    part = Batch(batch.examples[first:end], owner, batch.start[rows], batch.clean[rows], answers, pictures)
    return part, drawn.rows(rows)


@torch.no_grad()
def _follow(run: Run) -> None:
    """Moves the averaged weights a little towards the model's; early on, when those move fast, a little more."""
    if run.average:
        keep = min(run.options.ema, run.step / (run.step + 9))
        own = [run.optimiser.masters[name] for name in run.average]
        torch._foreach_lerp_(list(run.average.values()), own, 1 - keep)
