"""`dgemma bench decode`: this project and transformers with the same weights, steps and dtype, in one run."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dgemma.bench.harness import KEEP_FREED, Side, Spread, cores, have_transformers, machine, unpacked, versions
from dgemma.bench.shapes import SHAPES, Shape

DTYPES = {"bf16": "bfloat16", "f32": "float32"}
STEPS_A_CANVAS = (12, 16, 20)
"""Random weights never converge: tokens a second are told for these many steps, which trained models need."""

OURS, THEIRS, TUNED = "dgemma", "transformers", "transformers, tuned malloc"
OTHER = "dgemma of "


@dataclass(frozen=True)
class Measured:
    """One side's figures, in seconds and bytes.

    start: from nothing until the weights are loaded; first: from nothing until a prompt is encoded and one step done.
    tokens_per_second: by steps a canvas, where a canvas costs its steps and one encoding as long as the prompt's.
    """

    start: Spread
    first: Spread
    prefill: Spread
    step: Spread
    peak_bytes: int | None
    tokens_per_second: dict[int, float]


@dataclass(frozen=True)
class Result:
    """A run. `ratios` are the other sides' step times over ours, pair by pair as they were measured.

    trajectories_equal: whether both gave the same canvases from the same draws; None where that was not looked at,
    which is in bf16, where each side rounds in its own way, and without transformers.
    """

    shape: str
    dtype: str
    threads: int
    repeats: int
    machine: str
    versions: dict[str, str]
    sides: dict[str, Measured]
    ratios: dict[str, Spread]
    trajectories_equal: bool | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def run(
    shape: str = "mid",
    dtype: str = "bf16",
    repeats: int = 5,
    threads: int | None = None,
    tuned: bool = False,
    device: str = "cpu",
    formats: Sequence[str] = (),
    against: Path | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Result:
    """Measures decoding; `tuned` adds transformers with an allocator that gives no memory back; formats: this project
    again with its weights quantised to each; against: another state of this project, a wheel or a folder with dgemma/.

    Without transformers only this project is measured. Raises ValueError for a value that is not known, OSError if a
    side's process ends.
    """
    check(shape, dtype, repeats, threads)
    from dgemma.checkpoints.load import resolve_device
    from dgemma.quant.quantize import Quantization

    device = str(resolve_device(device))
    threads = threads or cores()
    names = [OURS, *(f"{OURS}, {Quantization(format).format}" for format in formats)]
    if have_transformers(progress):
        names += [THEIRS, *([TUNED] if tuned else [])]
    with ExitStack() as stack:
        directory = stack.enter_context(TemporaryDirectory(prefix="dgemma-bench-"))
        other = stack.enter_context(unpacked(against)) if against else None
        if against:
            names.insert(1, f"{OTHER}{against.name}")
        progress(f"writing random weights: {shape}, {dtype}")
        write_weights(SHAPES[shape], DTYPES[dtype], Path(directory))
        options = {"directory": directory, "device": device, "threads": threads, "tokens": SHAPES[shape].prompt}
        sides, ratios, equal = _measure(names, options, other, SHAPES[shape], repeats, dtype == "f32", progress)
    return Result(shape, dtype, threads, repeats, machine(), versions(THEIRS in names), sides, ratios, equal)


def write_weights(shape: Shape, dtype: str, directory: Path) -> None:
    """A model directory with random weights from a fixed seed, in the released format."""
    import torch

    from dgemma.checkpoints.save import save_model
    from dgemma.config import GenerationConfig
    from dgemma.model.network import DiffusionGemma

    model = DiffusionGemma(shape.config).init_weights(seed=0)
    save_model(model.to(getattr(torch, dtype)), directory, GenerationConfig())


def check(shape: str, dtype: str, repeats: int, threads: int | None) -> None:
    for name, value, known in (("shape", shape, SHAPES), ("dtype", dtype, DTYPES)):
        if value not in known:
            raise ValueError(f"{name} {value!r} is not known; known: {', '.join(known)}")
    for name, count in (("repeats", repeats), ("threads", threads)):
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, not {count}")


def _open(name: str, options: dict[str, Any], other: dict[str, str] | None) -> Side:
    if name.startswith(OTHER):
        return Side(name, "dgemma.bench.sides:Ours", options, other)
    if name.startswith(OURS):
        format = name.removeprefix(OURS).removeprefix(", ") or None
        return Side(name, "dgemma.bench.sides:Ours", options | {"quantize": format})
    return Side(name, "dgemma.bench.sides:Transformers", options, KEEP_FREED if name == TUNED else None)


def _measure(
    names: list[str],
    options: dict[str, Any],
    other: dict[str, str] | None,
    shape: Shape,
    repeats: int,
    compare: bool,
    progress: Callable[[str], None],
) -> tuple[dict[str, Measured], dict[str, Spread], bool | None]:
    """The sides take turns in everything, so that whatever else the machine does falls on all of them."""
    seconds: dict[str, dict[str, list[float]]] = {
        name: {what: [] for what in ("start", "first", "prefill", "step")} for name in names
    }
    with ExitStack() as stack:
        sides: dict[str, Side] = {}
        for turn in range(repeats):
            progress(f"start-up, {turn + 1} of {repeats}")
            for name in names:
                if name in sides:
                    sides[name].close()
                side = sides[name] = stack.enter_context(_open(name, options, other))
                seconds[name]["start"].append(side.ready_s)
                seconds[name]["first"].append(side.ready_s + side.ask("decode", steps=1))
        low, high = shape.steps
        for turn in range(repeats):
            progress(f"prefill and steps, {turn + 1} of {repeats}")
            for name in names:
                seconds[name]["prefill"].append(sides[name].ask("prefill"))
            short = {name: sides[name].ask("decode", steps=low) for name in names}
            long = {name: sides[name].ask("decode", steps=high) for name in names}
            for name in names:
                seconds[name]["step"].append((long[name] - short[name]) / (high - low))
        peaks = {name: sides[name].ask("peak") for name in names}
        equal = None
        if compare and THEIRS in names:
            progress("comparing trajectories")
            equal = sides[OURS].ask("trajectory", steps=4) == sides[THEIRS].ask("trajectory", steps=4)
    measured = {name: _summary(seconds[name], peaks[name], shape.config.canvas_length) for name in names}
    steps = {name: seconds[name]["step"] for name in names}
    ratios = {name: Spread.of([t / o for t, o in zip(steps[name], steps[OURS], strict=True)]) for name in names[1:]}
    return measured, ratios, equal


def _summary(seconds: dict[str, list[float]], peak: int | None, canvas: int) -> Measured:
    spreads = {what: Spread.of(values) for what, values in seconds.items()}
    prefill, step = spreads["prefill"].median, spreads["step"].median
    rates = {count: canvas / (prefill + count * step) for count in STEPS_A_CANVAS}
    return Measured(**spreads, peak_bytes=peak, tokens_per_second=rates)
