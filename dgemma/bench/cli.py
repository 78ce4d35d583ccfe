"""`dgemma bench`: measurements, each a command. Importing this imports no torch."""

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar, get_args

import typer

from dgemma.bench import constrain as constraining
from dgemma.bench import decode as decoding
from dgemma.bench import experts as mixing
from dgemma.bench import full as filling
from dgemma.bench import serve as serving
from dgemma.bench import step as stepping
from dgemma.bench import train as training
from dgemma.bench import vision as seeing
from dgemma.bench.harness import Spread
from dgemma.bench.shapes import SHAPES
from dgemma.flags import Format

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

app = typer.Typer(help="Measure this project beside others.", no_args_is_help=True)

Shape = Annotated[str, typer.Option(help=f"size of the network: {', '.join(SHAPES)}")]
Dtype = Annotated[str, typer.Option(help=f"what to compute in: {', '.join(decoding.DTYPES)}")]
Repeats = Annotated[int, typer.Option(help="times that everything is measured")]
Threads = Annotated[int | None, typer.Option(help="threads a side may use; all cores if not told")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N")]
Tuned = Annotated[bool, typer.Option("--tuned", help="also transformers with a tuned malloc")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]

Result = TypeVar(
    "Result",
    decoding.Result,
    training.Result,
    serving.Result,
    constraining.Result,
    filling.Result,
    mixing.Result,
    seeing.Result,
    stepping.Result,
)


@app.command()
def decode(
    shape: Shape = "mid",
    dtype: Dtype = "bf16",
    repeats: Repeats = 5,
    threads: Threads = None,
    device: Device = "cpu",
    tuned: Tuned = False,
    formats: Annotated[str, typer.Option(help="this project with weights in these too: int8,fp8,…")] = "",
    against: Annotated[
        Path | None, typer.Option(help="another state of this project: a wheel, or a folder with dgemma/")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Decode with this project and with transformers: same random weights, same steps, same dtype."""
    asked = [f for f in formats.split(",") if f]
    run = lambda: decoding.run(  # noqa: E731
        shape, dtype, repeats, threads, tuned, device, asked, against, progress=_tell
    )
    _report(run, show, as_json)


@app.command()
def train(
    shape: Shape = "train",
    dtype: Dtype = "f32",
    batch: Annotated[int, typer.Option(help="examples a step")] = 16,
    canvases: Annotated[int, typer.Option(help="noised canvases of each example")] = 2,
    causal: Annotated[bool, typer.Option(help="with the left-to-right loss")] = True,
    repeats: Repeats = 5,
    steps: Annotated[int, typer.Option(help="steps of the optimiser a repeat")] = 3,
    threads: Threads = None,
    device: Device = "cpu",
    tuned: Tuned = False,
    as_json: AsJson = False,
) -> None:
    """Train with this project and with transformers: same random weights, same canvases, same loss, same dtype."""
    run = lambda: training.run(  # noqa: E731
        shape, dtype, batch, canvases, causal, repeats, steps, threads, tuned, device, progress=_tell
    )
    _report(run, show_training, as_json)


@app.command()
def serve(
    shape: Annotated[
        str | None, typer.Option(help=f"random weights: {', '.join(SHAPES)}", show_default="train")
    ] = None,
    model: Annotated[str | None, typer.Option(help="weights of a model instead: a name, directory or hub id")] = None,
    dtype: Annotated[str | None, typer.Option(help="of --shape: bf16 or f32", show_default="f32")] = None,
    requests: Annotated[int, typer.Option(help="answers that each client asks for")] = 2,
    concurrency: Annotated[str, typer.Option(help="clients at once, with commas")] = "1,4,16,64",
    repeats: Repeats = 5,
    threads: Threads = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Serve many clients, beside the engine without HTTP and transformers one at a time: same weights, same steps."""
    numbers = concurrency.split(",")
    if not all(number.strip().isdecimal() for number in numbers):
        raise typer.BadParameter(f"--concurrency takes numbers with commas, such as 1,4, not {concurrency!r}")
    levels = [int(number) for number in numbers]
    run = lambda: serving.run(  # noqa: E731
        shape, model, dtype, requests, levels, repeats, threads, device, progress=_tell
    )
    _report(run, show_serving, as_json)


@app.command()
def vision(
    layers: Annotated[int, typer.Option(help="of the tower; the release has 27")] = 2,
    budget: Annotated[int, typer.Option(help="soft tokens an image may take")] = 280,
    dtype: Dtype = "f32",
    repeats: Repeats = 5,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Photos to soft tokens with this project and with transformers: same random weights of the released widths."""
    run = lambda: seeing.run(layers, budget, dtype, repeats, threads, progress=_tell)  # noqa: E731
    _report(run, show_vision, as_json)


@app.command()
def experts(
    shape: Shape = "26b",
    count: Annotated[int | None, typer.Option("--experts", help="so many, and as much less of a canvas")] = None,
    formats: Annotated[str, typer.Option(help="with commas")] = ",".join(get_args(Format)),
    repeats: Repeats = 9,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Time one layer's experts for a canvas in each format, beside bfloat16."""
    chosen = [format for format in formats.split(",") if format]
    run = lambda: mixing.run(shape, count, chosen, repeats, threads, progress=_tell)  # noqa: E731
    _report(run, show_experts, as_json)


@app.command()
def full(
    shape: Shape = "26b",
    format: Annotated[Format, typer.Option(help="what the weights are quantised to")] = "w4a8",
    steps: Annotated[int, typer.Option(help="denoising steps that are timed")] = 3,
    threads: Threads = None,
    directory: Annotated[
        Path | None, typer.Option(help="keeps the checkpoint there, and takes it from there", show_default="a new one")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Load and run the released size from random weights in few bits: whether it fits, and what a step costs here."""
    run = lambda: filling.run(shape, format, steps, threads, directory, progress=_tell)  # noqa: E731
    _report(run, show_full, as_json)


@app.command()
def step(
    shape: Shape = "mid",
    format: Annotated[str, typer.Option(help=f"bf16, {', '.join(get_args(Format))}")] = stepping.PLAIN,
    device: Device = "cpu",
    prompt: Annotated[int, typer.Option(help="tokens before the canvas")] = 1024,
    batch: Annotated[int, typer.Option(help="canvases at once")] = 1,
    repeats: Repeats = 10,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Take one denoising step by part, beside the floor: what this machine's bandwidth and matmul rate allow."""
    run = lambda: stepping.run(shape, format, device, prompt, batch, repeats, threads, progress=_tell)  # noqa: E731
    _report(run, show_step, as_json)


@app.command()
def constrain(
    tokenizer: Annotated[
        Path | None, typer.Option(help="directory of a tokenizer, such as the release's", show_default="tiny's")
    ] = None,
    shape: Shape = "mid",
    dtype: Dtype = "bf16",
    repeats: Repeats = 15,
    threads: Threads = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Keep to a tool's schema: time to make the automaton, and of a step beside the same step without it."""
    run = lambda: constraining.run(tokenizer, shape, dtype, repeats, threads, device, progress=_tell)  # noqa: E731
    _report(run, show_constraint, as_json)


def show(result: decoding.Result) -> None:
    """A table: medians, and the least and most of the repeats."""
    told = f"{result.shape}, {result.dtype}, {result.threads} threads, {result.repeats} repeats"
    table = _table(f"decode: {told}", result.sides)
    sides = result.sides.values()
    table.add_row("start, weights loaded, s", *(_spread(s.start) for s in sides))
    table.add_row("start, first step done, s", *(_spread(s.first) for s in sides))
    table.add_row("prefill, ms", *(_spread(s.prefill, 1e3) for s in sides))
    table.add_row("denoising step, ms", *(_spread(s.step, 1e3) for s in sides))
    for count in decoding.STEPS_A_CANVAS:
        table.add_row(f"tokens a second, {count} steps", *(f"{s.tokens_per_second[count]:.1f}" for s in sides))
    console = _finish(table, result)
    if result.trajectories_equal is not None:
        console.print(f"trajectories equal: {'yes' if result.trajectories_equal else 'no'}")


def show_experts(result: mixing.Result) -> None:
    """A line for each format."""
    told = f"{result.shape}, {result.experts} experts, {result.rows:.0f} rows each, {result.threads} threads"
    print(f"experts: {told}, {result.repeats} repeats")
    for name, seconds in result.seconds.items():
        ratio = f"{_spread(result.ratios[name])} times as fast as bf16" if name in result.ratios else ""
        print(f"{name:<8}{_spread(seconds, 1e3):<28} ms   {ratio}".rstrip())
    print(_measured_on(result.machine, result.versions))


def show_vision(result: seeing.Result) -> None:
    """The same for images."""
    from rich.console import Console

    told = f"{result.layers} layers, {result.budget} tokens, {result.dtype}, {result.threads} threads"
    table = _table(f"vision: {told}, {result.repeats} repeats", result.sides)
    if result.ratios:
        table.add_column("times dgemma's", justify="right")
    lines = {"JPEG to patches": "prepare", "patches to soft tokens": "tower", "the same, shown twice": "twice"}
    for line, what in lines.items():
        ratio = [_spread(result.ratios[what])] if result.ratios else []
        table.add_row(f"{line}, ms an image", *(_spread(getattr(s, what), 1e3) for s in result.sides.values()), *ratio)
    console = Console()
    console.print(table)
    if result.distance is not None:
        console.print(f"largest difference of soft tokens: {result.distance:.1e} of their scale")
    console.print(_measured_on(result.machine, result.versions))


def show_full(result: filling.Result) -> None:
    """One figure a line."""
    gib = float(1 << 30)
    peak = f"{result.peak_bytes / gib:.2f} GiB" if result.peak_bytes else "not told here"
    lines = {
        "weights in the file, in memory": f"{result.file_bytes / gib:.2f}, {result.weight_bytes / gib:.2f} GiB",
        "peak memory": peak,
        "written to swap": f"{result.swapped / gib:.2f} GiB",
        "start until loaded": f"{result.load:.1f} s",
        f"prefill of {result.prompt} tokens": f"{result.prefill:.2f} s",
        "denoising step": f"{_spread(result.step)} s",
    }
    print(f"full: {result.shape}, {result.format}, {result.threads} threads")
    print("\n".join(f"{name:<34}{value}" for name, value in lines.items()))
    print(_measured_on(result.machine, result.versions))


def show_step(result: stepping.Result) -> None:
    """A line for each part, and the whole."""
    from rich.console import Console
    from rich.table import Table

    work = f"{result.batch} canvases behind {result.prompt} tokens"
    table = Table(title=f"step: {result.shape}, {result.format}, {result.device}, {work}")
    for column in ("part", "GB", "GFLOP", "floor, ms", "measured, ms", "times the floor"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for name, part in result.parts.items():
        times = f"{part.seconds / part.floor:.2f}"
        figures = (part.bytes / 1e9, part.flops / 1e9, part.floor * 1e3, part.seconds * 1e3)
        table.add_row(name, *map(_short, figures), times)
    ratio = f"{result.step.median / result.floor:.2f}"
    table.add_row("step", "", "", _short(result.floor * 1e3), _spread(result.step, 1e3), ratio)
    console = Console()
    console.print(table)
    rates = ", ".join(f"{rate:.0f} at {steps} steps a canvas" for steps, rate in result.tokens_per_second.items())
    console.print(f"tokens a second: {rates}; prefill {result.prompt * result.batch / result.prefill:.0f}")
    told = f"copies {result.bandwidth / 1e9:.0f} GB/s, multiplies {result.rate / 1e12:.2f} TFLOP/s"
    weights = f"weights {result.weight_bytes / 1e9:.2f} GB"
    peak = f", peak {result.peak_bytes / 1e9:.2f} GB" if result.peak_bytes else ""
    console.print(f"{told}; {weights}{peak}; {_measured_on(result.machine, result.versions)}")


def show_training(result: training.Result) -> None:
    """The same for training."""
    objective = (
        f"{result.batch} examples of {result.canvases} canvases, {'with' if result.causal else 'no'} causal loss"
    )
    told = f"{result.shape}, {result.dtype}, {objective}, {result.threads} threads"
    table = _table(f"train: {told}, {result.repeats} repeats of {result.steps} steps", result.sides)
    sides = result.sides.values()
    table.add_row("step, ms", *(_spread(s.step, 1e3) for s in sides))
    table.add_row("examples a second", *(_spread(s.examples_per_second) for s in sides))
    table.add_row("first step's loss", *(f"{s.loss:.5f}" for s in sides))
    table.add_row("first step's gradient norm", *(f"{s.norm:.5f}" for s in sides))
    console = _finish(table, result)
    if result.agree is not None:
        console.print(f"first steps agree: {'yes' if result.agree else 'no'}")


def show_serving(result: serving.Result) -> None:
    """The same for serving, a row for each number of clients."""
    from rich.console import Console
    from rich.table import Table

    told = f"{result.model}, {result.dtype}, {result.device}, {result.threads} threads, {result.repeats} repeats"
    work = f"{result.requests} answers a client of {result.blocks} canvases, {result.steps} steps each"
    table = Table(title=f"serve: {told}\n{work}")
    table.add_column("clients", no_wrap=True)
    for name in ("first block, ms", "tokens/s", "p50, ms", "p99, ms", "fairness", "HTTP adds", "times theirs"):
        table.add_column(name, justify="right")
    rows = [
        *((f"{n}", level, result.overhead[n], (result.gain or {}).get(n)) for n, level in result.served.items()),
        *((f"{n}, no HTTP", level, None, None) for n, level in result.engine.items()),
        *([(f"1, {decoding.THEIRS}", result.transformers, None, None)] if result.transformers else []),
    ]
    for name, level, overhead, gain in rows:
        first, p50, p99 = (f"{1e3 * spread.median:.1f}" for spread in (level.first_block, level.p50, level.p99))
        rate, fairness = f"{level.tokens_per_second.median:.0f}", f"{level.fairness.median:.3f}"
        share = f"{overhead.median:.1%}" if overhead else ""
        table.add_row(name, first, rate, p50, p99, fairness, share, f"{gain.median:.2f}" if gain else "")
    console = Console()
    console.print(table)
    if shared := result.shared_prefix:
        cold, warm = _spread(shared.cold, 1e3), _spread(shared.warm, 1e3)
        console.print(f"first block behind a prefix of {shared.tokens} tokens, ms: new {cold}, known {warm}")
    console.print(_measured_on(result.machine, result.versions))


def show_constraint(result: constraining.Result) -> None:
    """The same for what a constraint costs."""
    told = f"{result.shape}, {result.dtype}, {result.threads} threads, {result.repeats} repeats"
    size = f"{result.states} states, {result.classes} classes of tokens"
    print(f"constrain: {told}; a tool of three arguments: {size}")
    print(
        f"automaton over {result.vocabulary} tokens, s: first {result.cold:.2f}, another schema {result.new:.2f}",
        end="",
    )
    print(f", known {result.warm:.4f}")
    print(f"step, ms: free {_spread(result.free, 1e3)}, bound {_spread(result.bound, 1e3)}")
    print(f"bound over free: {_spread(result.ratio)}")
    print(_measured_on(result.machine, result.versions))


def _tell(line: str) -> None:
    print(line, file=sys.stderr)


def _report(run: Callable[[], Result], show: Callable[[Result], None], as_json: bool) -> None:
    """Runs a measurement and prints its result; exit code 2 for a wrong call, 1 if a side failed."""
    try:
        result = run()
    except (ValueError, OSError) as error:
        _tell(f"error: {error}")
        raise typer.Exit(2 if isinstance(error, ValueError) else 1) from None
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
    else:
        show(result)


def _table(title: str, sides: Iterable[str]) -> "Table":
    from rich.table import Table

    table = Table(title=title)
    table.add_column("median (least … most)")
    for name in sides:
        table.add_column(name, justify="right")
    return table


def _finish(table: "Table", result: decoding.Result | training.Result) -> "Console":
    """Adds the rows that every measurement has, and prints the table and what it was measured on."""
    from rich.console import Console

    peaks = (side.peak_bytes for side in result.sides.values())
    table.add_row("peak memory, MiB", *("?" if peak is None else f"{peak >> 20}" for peak in peaks))
    if result.ratios:
        ratios = (_spread(result.ratios[name]) for name in result.sides if name in result.ratios)
        table.add_row("step, times dgemma's", "1", *ratios)
    console = Console()
    console.print(table)
    console.print(_measured_on(result.machine, result.versions))
    return console


def _measured_on(machine: str, versions: dict[str, str]) -> str:
    return f"{machine}; {', '.join(f'{name} {version}' for name, version in versions.items())}"


def _spread(value: Spread, scale: float = 1) -> str:
    median, least, most = (_short(figure * scale) for figure in (value.median, value.least, value.most))
    return f"{median} ({least} … {most})"


def _short(figure: float) -> str:
    return f"{figure:.0f}" if figure >= 100 else f"{figure:.2f}"
