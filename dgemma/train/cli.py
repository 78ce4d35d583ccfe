"""`dgemma train`, as a command. Importing this imports no torch."""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from dgemma.evals import tasks
from dgemma.flags import Device, Dtype, Format, Model, UsageError, checked, config_flags, flags_of
from dgemma.train.options import RECIPES, Recipe, TrainOptions

SHIPPED = ", ".join(sorted(path.stem for path in RECIPES.glob("*.toml")))
PRECISIONS = Literal["auto", "float32", "bfloat16"]


@flags_of(TrainOptions, "options")
def train(
    recipe: Annotated[str | None, typer.Argument(help=f"a TOML file, or one that ships: {SHIPPED}")] = None,
    model: Annotated[str | None, typer.Option(help="what to start from: embedded name, directory or hub id")] = None,
    data: Annotated[list[str] | None, typer.Option(help="JSONL file, or a task; may be given again")] = None,
    evaluate: Annotated[list[str] | None, typer.Option(help="task to measure on; may be given again")] = None,
    lora: Annotated[int | None, typer.Option(help="rank of an adapter; without it all weights are trained")] = None,
    quantize: Annotated[Format | None, typer.Option(help="keep the weights beside an adapter in fewer bits")] = None,
    out: Annotated[Path, typer.Option(help="folder of the run; an earlier run in it is continued")] = Path(
        "runs/train"
    ),
    device: Device = "auto",
    dtype: Annotated[PRECISIONS, typer.Option(help="auto: the file's own")] = "auto",
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="also write TensorBoard logs")] = False,
    png: Annotated[bool, typer.Option("--png", help="draw the curves at the end, as curves.png")] = False,
    *,
    options: dict[str, Any],
) -> None:
    """Train a model on conversations: a JSONL file, or tasks that make their own.

    A line of the file is {"messages": [...]} as for the API, or {"prompt": "...", "response": "..."}. A flag overrides
    the recipe. The result lies in OUT/adapter or OUT/model; `dgemma run` takes either.
    """
    plan = _plan(recipe, model, data, evaluate, lora, quantize, options)
    from dgemma.train.run import run

    result = run(plan, out, device, dtype, tensorboard, png)
    print(result)


@config_flags
def teach(
    task: Annotated[str, typer.Argument(help=f"one of {', '.join(tasks.NAMES)}, or NAME:LEVEL")],
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="the JSONL file to write")],
    count: Annotated[int, typer.Option(min=1, help="questions to ask")] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="of the questions and of all noise")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    *,
    config: dict[str, Any],
) -> None:
    """Write a model's own answers to training questions, those that the task's rule accepts, for `dgemma train`.

    A smaller --entropy-bound and more --steps make a slower, better teacher.
    """
    checked(model, config)
    from dgemma.language_model import load
    from dgemma.train.sources import levels_of
    from dgemma.train.teacher import teach as write

    chosen, levels = levels_of(task)
    tasks.prepare(chosen)
    tell = lambda asked, kept: print(f"{asked} of {count} asked, {kept} kept", file=sys.stderr)  # noqa: E731
    write(load(model, device, dtype), chosen, levels, count, out, seed, tell, **config)


def _plan(
    recipe: str | None,
    model: str | None,
    data: list[str] | None,
    evaluate: list[str] | None,
    lora: int | None,
    quantize: str | None,
    options: dict[str, Any],
) -> Recipe:
    if recipe is None and (model is None or not data):
        raise UsageError("give a recipe, or --model and --data")
    changes: dict[str, Any] = {}
    if model is not None:
        changes["model"] = model
    if data:
        changes["tasks"] = dict.fromkeys(data, 1.0)
    if evaluate:
        changes["evaluate"] = tuple(evaluate)
    if quantize is not None:
        changes["quantize"] = quantize
    try:
        plan = Recipe(**changes) if recipe is None else Recipe.from_toml(recipe).with_changes(**changes)
        if lora is not None:
            plan = plan.with_changes(lora={**(plan.lora or {"alpha": 2.0 * lora}), "rank": lora})
        return plan.with_options(**options)
    except ValueError as error:
        raise UsageError(str(error)) from None
