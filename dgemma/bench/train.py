"""`dgemma bench train`: steps of the training objective here and in plain transformers modules, in one run.

A step is a causal pass over prompts with gradients, a first pass without over every other canvas, a second pass over
all of them, cross-entropy of all positions (and of the answers, left to right), backward, clipping, and Adam over all
weights but the router's. Both sides start from the same weights and learn the same canvases over and over: making a
batch is not measured.

Shapes: B examples of P prompt tokens and one canvas of C; R = B * M canvases, M draws of noise of each; V vocabulary.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from copy import copy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import TYPE_CHECKING, Any

from dgemma.bench.decode import DTYPES, OURS, THEIRS, check, write_weights
from dgemma.bench.harness import KEEP_FREED, Side, Spread, cores, have_transformers, machine, versions
from dgemma.bench.shapes import SHAPES
from dgemma.bench.sides import Common

if TYPE_CHECKING:
    from torch import Tensor

RATE, CLIP, BETAS = 1.5e-4, 1.0, (0.9, 0.98)
CACHED, TUNED = f"{THEIRS}, one cache", f"{THEIRS}, one cache, tuned malloc"
TOLERANCE = 1e-4
"""Relative difference up to which losses and norms of a first step in float32 agree."""


@dataclass(frozen=True)
class Measured:
    """One side: seconds a step, examples a second, peak bytes, and its first step's loss and gradient norm."""

    step: Spread
    examples_per_second: Spread
    peak_bytes: int | None
    loss: float
    norm: float


@dataclass(frozen=True)
class Result:
    """A run. `ratios` are the other sides' step times over ours, pair by pair as they were measured.

    agree: whether loss and gradient norm of the first step are the same on all sides; None where that was not looked
    at, which is in bf16, where each side rounds in its own way, and without transformers.
    """

    shape: str
    dtype: str
    batch: int
    canvases: int
    causal: bool
    threads: int
    repeats: int
    steps: int
    machine: str
    versions: dict[str, str]
    sides: dict[str, Measured]
    ratios: dict[str, Spread]
    agree: bool | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def run(
    shape: str = "train",
    dtype: str = "f32",
    batch: int = 16,
    canvases: int = 2,
    causal: bool = True,
    repeats: int = 5,
    steps: int = 3,
    threads: int | None = None,
    tuned: bool = False,
    device: str = "cpu",
    progress: Callable[[str], None] = lambda line: None,
) -> Result:
    """Measures training, `steps` steps a repeat; `tuned` adds transformers with an allocator that gives no memory back.

    Without transformers only this project is measured. Raises ValueError for a value that is not known, OSError if a
    side's process ends.
    """
    check(shape, dtype, repeats, threads)
    for name, count in (("batch", batch), ("canvases", canvases), ("steps", steps)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, not {count}")
    from dgemma.checkpoints.load import resolve_device

    device, threads = str(resolve_device(device)), threads or cores()
    options = {"shape": shape, "batch": batch, "canvases": canvases, "causal": causal}
    options |= {"device": device, "threads": threads}
    names = [OURS]
    if have_transformers(progress):
        names += [THEIRS, CACHED, *([TUNED] if tuned else [])]
    with TemporaryDirectory(prefix="dgemma-bench-") as directory, ExitStack() as stack:
        progress(f"writing random weights: {shape}, {dtype}")
        write_weights(SHAPES[shape], DTYPES[dtype], Path(directory))
        sides = {name: stack.enter_context(_open(name, {"directory": directory, **options})) for name in names}
        progress("first step")
        first = {name: side.ask("step") for name, side in sides.items()}
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(repeats):
            progress(f"steps, {turn + 1} of {repeats}")
            for name, side in sides.items():
                seconds[name].append(side.ask("steps", count=steps) / steps)
        peaks = {name: side.ask("peak") for name, side in sides.items()}
    measured = {
        name: Measured(Spread.of(taken), Spread.of([batch / s for s in taken]), peaks[name], *first[name])
        for name, taken in seconds.items()
    }
    ratios = {name: Spread.of([t / o for t, o in zip(seconds[name], seconds[OURS], strict=True)]) for name in names[1:]}
    agree = None if dtype != "f32" or len(names) == 1 else all(_close(first[OURS], first[name]) for name in names)
    about = machine(), versions(len(names) > 1)
    return Result(shape, dtype, batch, canvases, causal, threads, repeats, steps, *about, measured, ratios, agree)


def _open(name: str, options: dict[str, Any]) -> Side:
    kind = {OURS: Ours, THEIRS: Transformers}.get(name, TransformersCached)
    return Side(name, f"{__name__}:{kind.__name__}", options, KEEP_FREED if name == TUNED else None)


def _close(ours: list[float], theirs: list[float]) -> bool:
    return all(math.isclose(a, b, rel_tol=TOLERANCE) for a, b in zip(ours, theirs, strict=True))


class _Training(Common, ABC):
    """What both sides learn, and how their steps are timed.

    examples: int64 [B, P + C]; clean, noised: int64 [R, C]; conditioned: bool [R], every other canvas.
    """

    def __init__(self, shape: str, batch: int, canvases: int, causal: bool, device: str, threads: int):
        super().__init__(device, threads)
        import torch

        from dgemma.train.objective import corrupt

        config, self.prompt = SHAPES[shape].config, SHAPES[shape].prompt
        self.canvases, self.causal = canvases, causal
        generator = torch.Generator().manual_seed(1)
        length = self.prompt + config.canvas_length
        examples = torch.randint(config.vocab_size, (batch, length), generator=generator)
        clean = examples[:, self.prompt :].repeat_interleave(canvases, 0)
        conditioned = torch.arange(len(clean)) % 2 == 0
        drawn = replace(corrupt(clean, config.vocab_size, generator), conditioned=conditioned)
        self.examples, self.clean, self.drawn = examples.to(device), clean.to(device), drawn.to(device)

    def step(self) -> tuple[float, float]:
        """Takes a step; its loss, and the norm of its gradient before clipping."""
        loss, norm = self._step()
        return float(loss), float(norm)

    def steps(self, count: int) -> float:
        """Seconds for so many steps."""
        self._wait()
        started = perf_counter()
        for _ in range(count):
            self.step()
        self._wait()
        return perf_counter() - started

    @abstractmethod
    def _step(self) -> "tuple[Tensor | float, Tensor | float]":
        """Loss and norm."""


class Ours(_Training):
    """This project, as its training loop has it: in bf16 with float32 masters."""

    def __init__(self, directory: str, **options: Any):
        super().__init__(**options)
        from dgemma.checkpoints.load import load_model
        from dgemma.memory import keep_freed_memory
        from dgemma.train.loop import Run
        from dgemma.train.objective import Batch
        from dgemma.train.options import TrainOptions

        if self.device == "cpu":
            keep_freed_memory()
        model = load_model(directory, self.device)
        chosen = TrainOptions(
            canvases=self.canvases, causal=float(self.causal), learning_rate=RATE, clip=CLIP, warmup=0
        )
        self.run = Run(model, chosen, dict(_learnt(model)))
        count, length = self.examples.shape
        owner = [example for example in range(count) for _ in range(self.canvases)]
        answers = [(example, self.prompt, length) for example in range(count)]
        self.batch = Batch(list(self.examples), owner, [self.prompt] * len(owner), self.clean, answers)

    def _step(self) -> tuple[float, float]:
        from dgemma.train.loop import take_step

        figures = take_step(self.run, self.batch, self.drawn)
        return figures["loss"] + figures.get("causal", 0.0), figures["norm"]


class Transformers(_Training):
    """transformers' modules and torch's fused AdamW, which in bf16 moves the bf16 weights themselves: the lesser work.

    The model is called as its signature offers: with the prompts, repeated for M canvases, and the noised canvases.
    """

    def __init__(self, directory: str, **options: Any):
        super().__init__(**options)
        import torch
        from transformers import DiffusionGemmaForBlockDiffusion

        model: Any = DiffusionGemmaForBlockDiffusion.from_pretrained(directory)
        self.model = model.train().to(self.device)
        self.weights = [weight for _, weight in _learnt(self.model)]
        self.optimiser = torch.optim.AdamW(self.weights, lr=RATE, betas=BETAS, weight_decay=0, fused=True)

    def _step(self) -> "tuple[Tensor, Tensor]":
        import torch

        loss = self._loss()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.weights, CLIP)
        self.optimiser.step()
        self.optimiser.zero_grad()
        return loss.detach(), norm

    def _loss(self) -> "Tensor":
        import torch

        prompts = self.examples[:, : self.prompt].repeat_interleave(self.canvases, 0)
        noised, chosen = self.drawn.noised, self.drawn.conditioned.nonzero().flatten()
        with torch.no_grad():
            believed = self.model(input_ids=prompts[chosen], decoder_input_ids=noised[chosen]).logits
        loss = self._diffusion({"input_ids": prompts}, believed, chosen)
        if self.causal:
            loss = loss + self._answers(self.model.model.encoder(input_ids=self.examples[:, :-1]).last_hidden_state)
        return loss

    def _diffusion(self, prefix: dict[str, Any], believed: "Tensor", chosen: "Tensor") -> "Tensor":
        """Cross-entropy of the second pass, behind prompts or a cache; believed: logits of the chosen canvases."""
        import torch.nn.functional as F

        previous = believed.new_zeros(*self.clean.shape, believed.shape[-1]).index_copy_(0, chosen, believed)
        conditioning = {"self_conditioning_logits": previous, "self_conditioning_mask": self.drawn.conditioned}
        logits = self.model(**prefix, decoder_input_ids=self.drawn.noised, **conditioning).logits
        return F.cross_entropy(logits.flatten(0, 1), self.clean.flatten())

    def _answers(self, states: "Tensor") -> "Tensor":
        """Cross-entropy of the answers, left to right, from the encoder's states [B, P + C - 1, hidden]."""
        import torch
        import torch.nn.functional as F

        cap = self.model.final_logit_softcapping
        logits = cap * torch.tanh(self.model.lm_head(states[:, self.prompt - 1 :]).float() / cap)
        return F.cross_entropy(logits.flatten(0, 1), self.examples[:, self.prompt :].flatten())


class TransformersCached(Transformers):
    """The same with the prompts encoded once, as someone who knows the modules well would write it.

    Both passes read one cache, whose rows are repeated for M canvases. The answers go through the same causal pass, and
    are then cropped from it.
    """

    def _loss(self) -> "Tensor":
        import torch
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        if self.causal:
            # Otherwise the sliding layers forget what the crop brings back into their window.
            cache.activate_past_recording()
        read = self.examples[:, :-1] if self.causal else self.examples[:, : self.prompt]
        states = self.model.model.encoder(input_ids=read, past_key_values=cache).last_hidden_state
        if self.causal:
            cache.crop(self.prompt - read.shape[1])
        chosen = self.drawn.conditioned.nonzero().flatten()
        with torch.no_grad():
            rows = copy(cache)
            rows.layers = [copy(layer) for layer in cache.layers]
            rows.batch_select_indices(chosen // self.canvases)
            believed = self.model(decoder_input_ids=self.drawn.noised[chosen], past_key_values=rows).logits
        cache.batch_repeat_interleave(self.canvases)
        loss = self._diffusion({"past_key_values": cache}, believed, chosen)
        return loss + self._answers(states) if self.causal else loss


def _learnt(model: Any) -> "list[tuple[str, Any]]":
    """A network's parameters by name, without those of router and image tower, which are frozen."""
    for name, weight in model.named_parameters():
        weight.requires_grad_("router" not in name and "vision" not in name)
    return [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
