"""`dgemma bench`: measurements, each a command. Importing this imports no torch."""

import json
import sys
from typing import Annotated

import typer

from dgemma.bench import decode as decoding
from dgemma.bench.harness import Spread
from dgemma.bench.shapes import SHAPES

app = typer.Typer(help="Measure this project beside others.", no_args_is_help=True)


@app.callback()
def _commands() -> None:
    """Keeps `decode` a command by name while it is the only one."""


@app.command()
def decode(
    shape: Annotated[str, typer.Option(help=f"size of the network: {', '.join(SHAPES)}")] = "mid",
    dtype: Annotated[str, typer.Option(help=f"what to compute in: {', '.join(decoding.DTYPES)}")] = "bf16",
    repeats: Annotated[int, typer.Option(help="times that everything is measured")] = 5,
    threads: Annotated[int | None, typer.Option(help="threads a side may use; all cores if not told")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N")] = "cpu",
    tuned: Annotated[bool, typer.Option("--tuned", help="also transformers with a tuned malloc")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
) -> None:
    """Decode with this project and with transformers: same random weights, same steps, same dtype."""
    try:
        tell = lambda line: print(line, file=sys.stderr)  # noqa: E731
        result = decoding.run(shape, dtype, repeats, threads, tuned, device, progress=tell)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2 if isinstance(error, ValueError) else 1) from None
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
    else:
        show(result)


def show(result: decoding.Result) -> None:
    """A table: medians, and the least and most of the repeats."""
    from rich.console import Console
    from rich.table import Table

    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    table = Table(title=f"decode: {result.shape}, {result.dtype}, {result.threads} threads, {result.repeats} repeats")
    table.add_column("median (least … most)")
    for name in result.sides:
        table.add_column(name, justify="right")
    sides = result.sides.values()
    table.add_row("start, weights loaded, s", *(_spread(s.start) for s in sides))
    table.add_row("start, first step done, s", *(_spread(s.first) for s in sides))
    table.add_row("prefill, ms", *(_spread(s.prefill, 1e3) for s in sides))
    table.add_row("denoising step, ms", *(_spread(s.step, 1e3) for s in sides))
    for count in decoding.STEPS_A_CANVAS:
        table.add_row(f"tokens a second, {count} steps", *(f"{s.tokens_per_second[count]:.1f}" for s in sides))
    table.add_row("peak memory, MiB", *("?" if s.peak_bytes is None else f"{s.peak_bytes >> 20}" for s in sides))
    if result.ratios:
        ratios = (_spread(result.ratios[name]) for name in result.sides if name in result.ratios)
        table.add_row("step, times dgemma's", "1", *ratios)
    console = Console()
    console.print(table)
    console.print(f"{result.machine}; {versions}")
    if result.trajectories_equal is not None:
        console.print(f"trajectories equal: {'yes' if result.trajectories_equal else 'no'}")


def _spread(value: Spread, scale: float = 1) -> str:
    median, least, most = (_short(figure * scale) for figure in (value.median, value.least, value.most))
    return f"{median} ({least} … {most})"


def _short(figure: float) -> str:
    return f"{figure:.0f}" if figure >= 100 else f"{figure:.2f}"
