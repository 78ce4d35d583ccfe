"""Curves from a run's log.jsonl: loss by noise level, causal loss, exact match.

`python -m dgemma.train.curves DIR` draws them into DIR/curves.png.
"""

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dgemma.train.log import QUARTERS, read_entries, telling

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANEL = 6.4, 4.2  # inches
DPI = 150
EXACT = "eval/exact/"
REACH = 100  # a running mean reaches over this part of a curve to either side

# Noise levels are ordered, so their colours go from dark to light; names are not, so theirs differ in hue.
# Both can be told apart by colour-blind readers: viridis; Okabe and Ito's palette without its yellow.
LEVEL_COLOURS = ("#440154", "#31688e", "#35b779", "#d4b000")
NAME_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
MARKERS = "osD^vPX"
INK = "#222222"


@dataclass(frozen=True)
class Series:
    """The figures that a log has under one name, and the steps they belong to."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


def read_log(path: Path) -> dict[str, Series]:
    """From names to figures, those of evaluations under "eval/…". What was not finite is NaN."""
    series: dict[str, Series] = {}
    for entry in read_entries(path):
        step = entry.pop("step")
        evaluated = {f"eval/{name}": value for name, value in entry.pop("eval", {}).items()}
        for name, value in (entry | evaluated).items():
            line = series.setdefault(name, Series())
            line.steps.append(step)
            line.values.append(float("nan") if value is None else value)
    return series


def running_mean(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """The mean of the `window` (odd) values around each, of those that are there and finite; NaN if none is."""
    finite = np.isfinite(values)
    reach = window // 2
    totals = [
        np.concatenate([[0.0], np.cumsum(np.pad(part, reach))])
        for part in (np.where(finite, values, 0.0), finite.astype(float))
    ]
    sums, counts = (total[window:] - total[:-window] for total in totals)
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)


def draw(directory: Path, file: Path | None = None) -> Path:
    """Draws a run's curves into `file`, directory/curves.png by default, and returns that.

    Panels without figures are left out. Raises ValueError if all are, or if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError:
        raise ValueError("curves need the extra: pip install 'dgemma[train]'") from None
    log = directory / "log.jsonl"
    series = read_log(log)
    panels: list[tuple[str, Callable[[Axes, Mapping[str, Series]], None]]] = []
    if "loss" in series:
        panels.append(("Loss by noise level", _draw_levels))
    if "causal" in series:
        panels.append(("Causal loss", _draw_causal))
    if any(name.startswith(EXACT) for name in series):
        panels.append(("Exact match", _draw_exact))
    if not panels:
        raise ValueError(f"{log} has no loss and no exact match to draw")
    # A figure without pyplot is drawn by Agg and needs no display.
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
    figure = Figure(figsize=(PANEL[0] * len(panels), PANEL[1]), dpi=DPI, layout=layout)
    row = figure.subplots(1, len(panels), squeeze=False, sharex=True)[0]
    for axes, (title, fill) in zip(row, panels, strict=True):
        fill(axes, series)
        _dress(axes, title)
    file = file or directory / "curves.png"
    with telling(file):
        figure.savefig(file, format="png")
    return file


def _draw_levels(axes: "Axes", series: Mapping[str, Series]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    for i in (3, 2, 1, 0):  # the noisiest lies highest
        if QUARTERS[i] in series:
            _curve(axes, series[QUARTERS[i]], LEVEL_COLOURS[i], f"{25 * i}–{25 * i + 25} % noise")
    _curve(axes, series["loss"], INK, "mean")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def _draw_causal(axes: "Axes", series: Mapping[str, Series]) -> None:
    _curve(axes, series["causal"], NAME_COLOURS[0])
    axes.set_ylim(bottom=0)


def _draw_exact(axes: "Axes", series: Mapping[str, Series]) -> None:
    names = [name for name in series if name.startswith(EXACT)]
    for i, name in enumerate(names):
        percent = [100 * value for value in series[name].values]
        (line,) = axes.plot(series[name].steps, percent, label=name.removeprefix(EXACT), markersize=4, linewidth=1.6)
        line.set(color=NAME_COLOURS[i % 7], marker=MARKERS[i % 7], linestyle=("-", "--", ":")[i // 7 % 3])
    axes.set_ylim(-2, 102)
    axes.yaxis.set_major_formatter("{x:.0f} %")


def _curve(axes: "Axes", line: Series, colour: str, label: str = "") -> None:
    values = np.array(line.values)
    axes.plot(line.steps, values, color=colour, alpha=0.2, linewidth=0.7, zorder=1)
    smooth = running_mean(values, len(values) // REACH * 2 + 1)
    axes.plot(line.steps, smooth, color=colour, linewidth=1.8, label=label or None, zorder=2)


def _dress(axes: "Axes", title: str) -> None:
    from matplotlib.ticker import EngFormatter

    axes.set_title(title, loc="left", color=INK, fontsize=12, fontweight="bold")
    axes.set_xlabel("step", color=INK)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(color="#999999", labelcolor=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=9, labelcolor=INK)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m dgemma.train.curves", description="Draw a training run's curves.")
    parser.add_argument("directory", type=Path, help="where the run keeps its log.jsonl")
    try:
        print(draw(parser.parse_args().directory))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
