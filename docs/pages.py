"""What of the documentation site is made: `python docs/pages.py` writes docs/site/reference.md and its pictures.

The reference comes from the commands and dataclasses themselves; the pictures are traces of the embedded models, drawn.
`make docs` builds the site.
"""

import dataclasses
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import typer.main

from dgemma.cli import app
from dgemma.config import GenerationConfig, MediaConfig
from dgemma.decoding import trace
from dgemma.decoding.events import Step
from dgemma.train.options import TrainOptions

SITE = Path(__file__).parent / "site"
PUZZLE = ".16....9. 45...72.. ..8..6731 .69.34..5 .4579.... ...5.24.9 ..1.4...7 ...1893.. .8.67...."
STORY = "Tell a short story about Mia and a red boat."
ROW = 10
"""Tokens of a line of a Sudoku: nine cells and its end."""


def reference() -> str:
    """Every command with its options, then the options of decoding, images, training and requests."""
    parts = ["# Reference\n\nMade by `docs/pages.py` from the code: names and defaults are what it takes.\n"]
    parts += ["## Commands\n", *commands(typer.main.get_command(app), "dgemma")]
    told = "Fields of `generation_config.json`, arguments of `lm.generate` and `lm.stream`, fields of a request."
    parts += ["## Decoding\n", f"{told}\n", options(GenerationConfig)]
    parts += ["## Images and video\n", "`media={…}` in Python, `media` of a request.\n", options(MediaConfig)]
    parts += ["## Training\n", "The table `[train]` of a recipe, or flags of `dgemma train`.\n", options(TrainOptions)]
    return "\n".join([*parts, *requests()])


def commands(group: Any, name: str) -> Iterator[str]:
    for own in sorted(group.commands):
        command, whole = group.commands[own], f"{name} {own}"
        if hasattr(command, "commands"):
            yield from commands(command, whole)
            continue
        yield f"### {whole}\n\n{' '.join(command.help.split())}\n"
        rows = [(spelled(p), p.help or "", shown(p)) for p in command.params if p.name != "help" and not p.hidden]
        if rows:
            yield table(("option", "is", "default"), rows)


def spelled(parameter: Any) -> str:
    """An option as it is typed; an argument in capitals."""
    argument = type(parameter).__name__ == "TyperArgument"
    return parameter.name.upper() if argument else ", ".join(f"`{name}`" for name in parameter.opts)


def shown(parameter: Any) -> str:
    if isinstance(parameter.show_default, str):
        return parameter.show_default
    default = parameter.default
    if getattr(parameter, "is_flag", False) and not default:
        return ""
    return "required" if parameter.required else "" if default is None or default == () else str(default)


def options(kind: type) -> str:
    rows = []
    for field in dataclasses.fields(kind):
        if "help" in field.metadata:
            rows.append((f"`{field.name}`", field.metadata["help"], str(field.default)))
    return table(("field", "is", "default"), rows)


def requests() -> Iterator[str]:
    """Bodies of the two endpoints that generate."""
    from dgemma.serve.schema import ChatRequest, CompletionRequest

    for kind, path in ((ChatRequest, "/v1/chat/completions"), (CompletionRequest, "/v1/completions")):
        schema = kind.model_json_schema()
        fields = schema["properties"]
        idle = [
            name for name, values in fields.items() if None in values.get("enum", ()) or values.get("type") == "null"
        ]
        told = {name: values["description"] for name, values in fields.items() if "description" in values}
        plain = [name for name in fields if name not in told and name not in idle]
        yield f"## POST {path}\n\n`/openapi.json` of a running server has types and ranges.\n"
        yield table(("field", "is"), [(f"`{name}`", what) for name, what in told.items()])
        yield f"As in OpenAI's or vLLM's interface: {listed(plain)}.\n"
        yield f"Accepted only at a value without effect: {listed(idle)}.\n"


def listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def traced(model: str, prompt: str, path: Path) -> trace.Trace:
    """A run of the real command, as it left it in a file."""
    command = [
        sys.executable,
        "-m",
        "dgemma",
        "run",
        model,
        "--prompt",
        prompt,
        "--trace",
        str(path),
        "--device",
        "cpu",
    ]
    subprocess.run(command, check=True, capture_output=True)
    return trace.read(path)


def draw_sudoku(told: trace.Trace, path: Path) -> None:
    """Above what is believed, coloured by entropy; below what the next step sees, with what was accepted in light."""
    steps = [event for event in told.events if isinstance(event, Step)]
    chosen = sorted({round(i * (len(steps) - 1) / 4) for i in range(5)})
    figure, axes = plt.subplots(2, len(chosen), figsize=(10, 4.3), layout="constrained")
    for column, step in enumerate(steps[i] for i in chosen):
        for row, (values, tokens) in enumerate(
            ((step.entropy / 2.2, step.best), (step.accepted.float() * 0.6, step.canvas))
        ):
            place = axes[row, column]
            place.imshow(values.float().reshape(-1, ROW)[:, :9], vmin=0, vmax=1)
            place.axis("off")
            for i, token in enumerate(tokens.tolist()):
                text = told.tokens[token].text.strip() if token in told.tokens else "·"
                if i % ROW < 9 and len(text) == 1:
                    place.text(i % ROW, i // ROW, text, ha="center", va="center", color="white", fontsize=7)
        axes[0, column].set_title(f"step {step.step}: {step.mean_entropy:.3f} nats", fontsize=9)
        axes[1, column].set_title(f"{int(step.accepted.sum())} of {len(step.best)} accepted", fontsize=9)
    figure.savefig(path)
    plt.close(figure)


def draw_steps(told: trace.Trace, path: Path) -> None:
    """A block of text: entropy and acceptance of every position at every step, and what falls meanwhile."""
    steps = [event for event in told.events if isinstance(event, Step) and event.block == 0]
    entropy, accepted = (
        np.stack([getattr(s, name).float().numpy() for s in steps]) for name in ("entropy", "accepted")
    )
    figure, axes = plt.subplots(3, 1, figsize=(10, 6), layout="constrained", height_ratios=(2, 2, 1.2))
    extent = (-0.5, entropy.shape[1] - 0.5, len(steps) + 0.5, 0.5)
    shades = axes[0].imshow(entropy, aspect="auto", cmap="magma", extent=extent)
    axes[0].set(title="entropy in nats", ylabel="step", xticks=[])
    figure.colorbar(shades, ax=axes[0])
    axes[1].imshow(accepted, aspect="auto", cmap="Greys_r", vmin=0, vmax=1, extent=extent)
    axes[1].set(title="accepted (white)", ylabel="step", xlabel="position in the canvas")
    number = [step.step for step in steps]
    axes[2].plot(number, [step.mean_entropy for step in steps], label="mean entropy")
    axes[2].plot(number, [step.temperature for step in steps], label="temperature")
    axes[2].set(xlabel="step")
    axes[2].legend()
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    (SITE / "reference.md").write_text(reference(), encoding="utf-8")
    matplotlib.use("agg")
    plt.rcParams["savefig.dpi"] = 110
    with tempfile.TemporaryDirectory() as folder:
        draw_sudoku(traced("sudoku", PUZZLE, Path(folder) / "sudoku.trace"), SITE / "pictures" / "sudoku.png")
        draw_steps(traced("tiny", STORY, Path(folder) / "tiny.trace"), SITE / "pictures" / "steps.png")


if __name__ == "__main__":
    main()
