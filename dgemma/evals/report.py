"""A summary to look at: a table for the terminal, Markdown, JSON, a picture. matplotlib is imported only for that."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from dgemma.evals.measure import ALL, Row, Share

if TYPE_CHECKING:
    from types import ModuleType

    from dgemma.evals.formats import Cost

INK, EXACT, VALID = "#404040", "#2f6db5", "#a9c7e8"


def table(rows: Sequence[Row], title: str) -> Table:
    """For rich to print: shares with their 95 % intervals below them."""
    header, *lines = cells(rows)
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for name in header:
        # In 80 columns, only names of several words need to wrap.
        made.add_column(
            name,
            justify="right" if made.columns else "left",
            no_wrap=" " not in name,
            min_width=7 if " " in name else None,
        )
    for line in lines:
        made.add_row(*(cell.replace(" (", "\n(") for cell in line))
    return made


def markdown(rows: Sequence[Row]) -> str:
    """The same table in Markdown."""
    return _markdown(cells(rows))


def share_markdown(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Levels in Markdown, each with a "count" and shares by name."""
    names = [name for name in next(iter(rows.values())) if name != "count"]
    lines = [[level, str(row["count"]), *(_interval(row[name]) for name in names)] for level, row in rows.items()]
    return _markdown([["level", "items", *(name.replace("_", " ") for name in names)], *lines])


def formats_markdown(rows: "Sequence[Cost]") -> str:
    """A line for each format."""
    header = ["format", "bits a weight", "bytes", "KL, nats a position", "exact", "gained, lost", "steps"]
    lines = [
        [
            row.format,
            f"{row.bits:.2f}",
            f"{row.bytes:,}",
            f"{row.divergence:.5f}",
            _interval(row.exact),
            f"{row.gained:.1%}, {row.lost:.1%}",
            f"{row.steps:.1f}",
        ]
        for row in rows
    ]
    return _markdown([header, *lines])


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    header, *rest = lines
    ruler = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ruler, *rest))


def to_dict(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as JSON can hold them."""
    return [asdict(row) for row in rows]


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """Header and rows as text. A part that a level lacks is "-"."""
    parts = list(dict.fromkeys(name for row in rows for name in row.parts))
    header = ["level", "items", "exact", "valid", *parts, "steps", "tokens a step", "converged"]
    return [
        header,
        *(
            [
                row.level,
                str(row.count),
                _interval(row.exact),
                _interval(row.valid),
                *(_percent(row.parts[name]) if name in row.parts else "-" for name in parts),
                f"{row.steps:.1f}",
                f"{row.tokens_per_forward:.1f}",
                _percent(row.converged),
            ]
            for row in rows
        ),
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _interval(share: Share) -> str:
    return f"{_percent(share.share)} ({100 * share.low:.1f}-{100 * share.high:.1f})"


def pyplot() -> "ModuleType":
    """matplotlib.pyplot, drawing to files. ValueError says how to get it."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("a picture needs matplotlib: pip install 'dgemma[train]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def picture(rows: Sequence[Row], title: str, path: Path) -> None:
    """Writes a PNG: exact and valid shares by level with their intervals, and mean steps beside them."""
    levels = [row for row in rows if row.level != ALL] or list(rows)
    plt = pyplot()
    figure, (shares, steps) = plt.subplots(
        1, 2, figsize=(3 + 1.1 * len(levels), 3.4), width_ratios=(2, 1), layout="constrained"
    )
    at = range(len(levels))
    for name, colour, side in (("exact", EXACT, -0.2), ("valid", VALID, 0.2)):
        values: list[Share] = [getattr(row, name) for row in levels]
        errors = [[100 * (v.share - v.low) for v in values], [100 * (v.high - v.share) for v in values]]
        shares.bar(
            [x + side for x in at],
            [100 * v.share for v in values],
            width=0.36,
            color=colour,
            label=name,
            yerr=errors,
            error_kw={"ecolor": INK, "elinewidth": 1, "capsize": 2},
        )
    shares.set(ylim=(0, 105), ylabel="% of answers, with 95 % interval")
    shares.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    steps.bar(at, [row.steps for row in levels], width=0.5, color=INK)
    steps.set(ylabel="mean steps of an answer")
    for axes in (shares, steps):
        axes.set_xticks(at, [row.level for row in levels])
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK, length=0)
    figure.suptitle(title, x=0.01, ha="left", color=INK)
    figure.savefig(path, format="png", dpi=150)
    plt.close(figure)
