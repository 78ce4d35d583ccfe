"""`dgemma bench full`: the released size in few bits, from random weights: whether it fits here, and what a step costs.

A checkpoint is written as `dgemma quantize` would, and loaded and run in a process of its own, so that its memory and
time are those of a user who has the real file.
"""

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from dgemma.bench.harness import Side, Spread, cores, machine, peak_bytes, versions
from dgemma.bench.shapes import SHAPES


@dataclass(frozen=True)
class Result:
    """Seconds and bytes. load: from the start of the process until the weights are there; swapped: bytes that this
    machine wrote to swap meanwhile; step: of 256 tokens behind a prompt of `prompt`."""

    shape: str
    format: str
    threads: int
    machine: str
    versions: dict[str, str]
    file_bytes: int
    weight_bytes: int
    load: float
    prefill: float
    step: Spread
    peak_bytes: int | None
    swapped: int
    prompt: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def run(
    shape: str = "26b",
    format: str = "w4a8",
    steps: int = 3,
    threads: int | None = None,
    directory: Path | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Result:
    """directory: where the checkpoint is kept, and taken from if it is there; else it is written for this run only."""
    if shape not in SHAPES:
        raise ValueError(f"shape {shape!r} is not known; known: {', '.join(SHAPES)}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    threads = threads or cores()
    with ExitStack() as stack:
        if directory is None:
            directory = Path(stack.enter_context(TemporaryDirectory(prefix="dgemma-bench-")))
        if not (directory / "config.json").exists():
            progress(f"writing random weights: {shape}, {format}")
            with Side("the writer", "dgemma.bench.full:Writer", {}) as writer:
                writer.ask("write", shape=shape, format=format, directory=str(directory))
        file_bytes = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
        swapped = _swapped()
        progress("loading")
        options = {"directory": str(directory), "threads": threads, "prompt": SHAPES[shape].prompt}
        side = stack.enter_context(Side("dgemma", "dgemma.bench.full:Loaded", options))
        progress("prefill and steps")
        prefill = side.ask("prefill")
        times = [side.ask("step") for _ in range(steps)]
        return Result(
            shape=shape,
            format=format,
            threads=threads,
            machine=machine(),
            versions=versions(False),
            file_bytes=file_bytes,
            weight_bytes=side.ask("weights"),
            load=side.ready_s,
            prefill=prefill,
            step=Spread.of(times),
            peak_bytes=side.ask("peak"),
            swapped=_swapped() - swapped,
            prompt=SHAPES[shape].prompt,
        )


class Writer:
    """Makes the checkpoint; in a process of its own, whose memory goes with it."""

    def write(self, shape: str, format: str, directory: str) -> None:
        from dgemma.bench.random import random_model
        from dgemma.checkpoints.save import save_model
        from dgemma.config import GenerationConfig

        model = random_model(SHAPES[shape].config, format)
        save_model(model, directory, GenerationConfig(), max_shard_bytes=1_000_000_000)


class Loaded:
    """The checkpoint in use."""

    def __init__(self, directory: str, threads: int, prompt: int):
        import torch

        from dgemma.checkpoints.load import load_model
        from dgemma.decoding.noise import Noise

        torch.set_num_threads(threads)
        self.model = load_model(directory, "cpu").requires_grad_(False)
        config = self.model.config
        self.prompt = Noise(1, config.vocab_size, prompt).canvas(0)
        self.cache = self.model.new_cache()
        self.soft: Any = None
        self.canvas = Noise(0, config.vocab_size, config.canvas_length).canvas(0)[None]

    def prefill(self) -> float:
        import torch

        started = perf_counter()
        with torch.inference_mode():
            self.model.encode([self.prompt], self.cache)
        return perf_counter() - started

    def step(self) -> float:
        """Network and vocabulary, with the self-conditioning of the step before."""
        import torch

        from dgemma.decoding.vocabulary import read

        started = perf_counter()
        with torch.inference_mode():
            states = self.model.denoise_states(self.canvas, self.cache, self.soft)
            uniform = torch.full(self.canvas.shape, 0.5)
            reading = read(self.model.embed_tokens, states, torch.tensor([0.8]), uniform)
        self.soft, self.canvas = reading.soft, reading.proposal
        return perf_counter() - started

    def weights(self) -> int:
        return sum(tensor.nbytes for tensor in self.model.state_dict().values())

    def peak(self) -> int | None:
        return peak_bytes()


def _swapped() -> int:
    """Bytes written to swap since the machine started; 0 where the system does not tell."""
    status = Path("/proc/vmstat")
    if not status.exists():
        return 0
    pages = next(line for line in status.read_text().splitlines() if line.startswith("pswpout "))
    return int(pages.split()[1]) * os.sysconf("SC_PAGE_SIZE")
