"""`dgemma eval`: a model measured on held-out items of a task. Importing this imports neither torch nor matplotlib."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from dgemma.evals import conversations, tasks
from dgemma.flags import (
    Device,
    Dtype,
    Format,
    KVCache,
    Model,
    Quantize,
    UsageError,
    check_folders,
    checked,
    config_flags,
    load_checked,
)

if TYPE_CHECKING:
    from rich.progress import Progress

    from dgemma.evals.measure import Result, Row
    from dgemma.evals.perplexity import Judgement

COUNT = 200
"""Items of each level, if not told."""

TaskName = Annotated[str, typer.Argument(help=f"a FILE.jsonl of conversations, or one of {', '.join(tasks.NAMES)}")]
Count = Annotated[int | None, typer.Option(min=1, help="items of each level", show_default=f"{COUNT}; a file's all")]
Levels = Annotated[list[str] | None, typer.Option("--level", help="only this one; may be repeated", metavar="LEVEL")]
Cases = Annotated[Path | None, typer.Option(help="write each question, answer and verdict here", metavar="FILE.jsonl")]
Picture = Annotated[Path | None, typer.Option(help="draw the figures here", metavar="FILE")]
Judge = Annotated[str | None, typer.Option(help="MODEL, or hf:MODEL for transformers: its perplexity on the answers")]


@config_flags
def evaluate(
    task: TaskName,
    model: Model,
    count: Count = None,
    levels: Levels = None,
    seed: Annotated[int, typer.Option(min=0, help="of the items and of all noise")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="answers at once; changes speed and memory only")] = 32,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    kv_cache: KVCache = None,
    constrain: Annotated[
        bool, typer.Option("--constrain", help="answers keep to what is asked for: a schema, a call, the clues")
    ] = False,
    judge: Judge = None,
    cases: Cases = None,
    png: Picture = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="print a Markdown table")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    *,
    config: dict[str, Any],
) -> None:
    """Measure a model on held-out items of a task."""
    if as_json and as_markdown:
        raise UsageError("--json and --markdown exclude each other")
    check_folders(cases, png)
    chosen: Any = conversations if task.endswith(".jsonl") else _task(task)
    wanted = _levels(task, chosen, levels)
    if constrain and not hasattr(chosen, "constraint"):
        raise UsageError(f"--constrain has no effect: nothing binds the answers of {task}")
    directory = checked(model, config)

    from dgemma.evals import report
    from dgemma.evals.measure import measure, summary
    from dgemma.evals.perplexity import judgement, load_judge

    if png:
        report.pyplot()  # what is missing shows before the work, not after it
    judged = None
    with _progress() as progress:
        bar = progress.add_task("items", total=None)
        if chosen is conversations:
            items = conversations.read_items(task)[:count]
        else:
            drawn = (tasks.items(chosen, count or COUNT, seed, held_out=True, level=level) for level in wanted)
            items = [item for level in drawn for item in level]
        progress.update(bar, description="model")
        lm = load_checked(model, directory, device, dtype, quantize, kv_cache)
        progress.update(bar, description="answers", total=len(items))
        done = lambda count: progress.update(bar, completed=count)  # noqa: E731
        results = measure(lm, items, chosen, batch, seed, done, constrain, **config)
        if judge:
            progress.update(bar, description="judge")
            judged = judgement([r.text for r in results], load_judge(judge, device, dtype))
    rows = summary(results)
    if cases:
        cases.write_text("".join(json.dumps(_case(r), ensure_ascii=False) + "\n" for r in results), "utf-8")
    title = f"{task}, {model}"
    if png:
        report.picture(rows, title, png)
    if as_json:
        told: dict[str, Any] = {"task": task, "model": model, "seed": seed, "constrain": constrain, "options": config}
        told["rows"] = report.to_dict(rows)
        if judged:
            told["judge"] = {"model": judge, **asdict(judged)}
        print(json.dumps(told, indent=2, ensure_ascii=False))
    else:
        _tell(rows, title, as_markdown)
        if judge and judged:
            print(_verdict(judge, judged))


@config_flags
def evaluate_spans(
    task: Annotated[str, typer.Argument(help=f"one of {', '.join(tasks.NAMES)}")],
    model: Model,
    count: Annotated[int, typer.Option(min=1, help="items of each level")] = COUNT,
    levels: Levels = None,
    seed: Annotated[int, typer.Option(min=0, help="of the items, their spans and all noise")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    kv_cache: KVCache = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    *,
    config: dict[str, Any],
) -> None:
    """Measure how often a span cut out of a right answer comes back, against left to right."""
    if "max_new_tokens" in config:
        raise UsageError("--max-new-tokens has no effect: the span decides")
    chosen = _task(task)
    wanted = _levels(task, chosen, levels)
    directory = checked(model, config)

    from dgemma.evals.report import share_markdown
    from dgemma.evals.spans import measure_spans, summary

    with _progress() as progress:
        bar = progress.add_task("spans", total=None)
        items = [i for level in wanted for i in tasks.items(chosen, count, seed, held_out=True, level=level)]
        lm = load_checked(model, directory, device, dtype, quantize, kv_cache)
        progress.update(bar, total=len(items))
        results = measure_spans(lm, items, seed, lambda done: progress.update(bar, completed=done), **config)
    rows = summary(results)
    if as_json:
        told = {"task": task, "model": model, "seed": seed, "options": config, "levels": rows}
        print(json.dumps(told, indent=2, default=asdict))
    else:
        print(share_markdown(rows))


def _task(name: str) -> tasks.Task:
    try:
        return tasks.get(name)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _levels(name: str, task: Any, levels: Sequence[str] | None) -> Sequence[str]:
    strange = [level for level in levels or () if level not in task.LEVELS]
    if strange:
        raise UsageError(f"{name} has no level {strange[0]!r}; known are {', '.join(task.LEVELS)}")
    return list(dict.fromkeys(levels or task.LEVELS))


@config_flags
def evaluate_formats(
    model: Model,
    names: Annotated[list[str] | None, typer.Option("--task", help="one of them; repeated for several")] = None,
    formats: Annotated[str, typer.Option(help="what to quantise to, with commas")] = ",".join(get_args(Format)),
    count: Annotated[int, typer.Option(min=1, help="items of each level")] = 25,
    seed: Annotated[int, typer.Option(min=0, help="of the items and of all noise")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="answers at once; changes speed and memory only")] = 32,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    *,
    config: dict[str, Any],
) -> None:
    """Measure what fewer bits cost a model: exact answers and divergence of the logits, by format, beside float32."""
    chosen = {name: _task(name) for name in names or ()}
    if not chosen:
        raise UsageError(f"--task is needed, once or more: {', '.join(tasks.NAMES)}")
    wanted = formats.split(",")
    if unknown := [format for format in wanted if format not in get_args(Format)]:
        raise UsageError(f"--formats {unknown[0]!r} is not one of {', '.join(get_args(Format))}")
    directory = checked(model, config)

    from dgemma.evals.formats import measure_formats
    from dgemma.evals.report import formats_markdown

    asked = [
        (task, [item for level in _levels(name, task, None) for item in tasks.items(task, count, seed, True, level)])
        for name, task in chosen.items()
    ]
    load = lambda format: load_checked(model, directory, device, "float32", format)  # noqa: E731
    with _progress() as progress:
        bar = progress.add_task("float32", total=len(wanted) + 1)
        rows = []
        for row in measure_formats(
            load, wanted, asked, batch, seed, lambda format: progress.update(bar, description=format), **config
        ):
            rows.append(row)
            progress.advance(bar)
    if as_json:
        told = {"model": model, "tasks": list(chosen), "count": count, "seed": seed, "options": config}
        print(json.dumps(told | {"formats": rows}, indent=2, default=asdict))
    else:
        print(formats_markdown(rows))


def _progress() -> "Progress":
    """Shows how far the work is, on standard error if that is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    return Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())


def _case(result: "Result") -> dict[str, Any]:
    """An item as a line of --cases: what was asked, what is right, what came, what the check says."""
    item, answer = result.item, result.answer
    return {
        "level": item.level,
        "question": list(item.question),
        "tools": list(item.tools),
        "reference": item.answer,
        "answer": answer.text,
        "reasoning": answer.reasoning,
        "tool_calls": [asdict(call) for call in answer.tool_calls],
        **asdict(result.score),
        "seed": answer.seed,
        "steps": result.steps,
        "tokens_per_forward": result.tokens_per_forward,
        "converged": result.converged,
        "finish_reason": answer.finish_reason,
    }


def _tell(rows: "list[Row]", title: str, as_markdown: bool) -> None:
    from dgemma.evals import report

    if as_markdown:
        print(report.markdown(rows))
        return
    from rich.console import Console

    Console().print(report.table(rows, title))


def _verdict(judge: str, judged: "Judgement") -> str:
    left_out = f", {judged.empty} empty ones left out" if judged.empty else ""
    return (
        f"judge {judge}: perplexity {judged.perplexity:.2f} a token, {judged.bits_per_byte:.3f} bits a byte, "
        f"{judged.texts} answers{left_out}"
    )
