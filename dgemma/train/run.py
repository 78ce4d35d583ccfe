"""`dgemma train`: from a recipe to a checkpoint or an adapter."""

import dataclasses
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from dgemma import embedded
from dgemma.checkpoints.adapters import save_adapter
from dgemma.checkpoints.load import resolve_device
from dgemma.checkpoints.save import save_model
from dgemma.checkpoints.source import defaults_of, folders_of, resolve
from dgemma.config import ModelConfig
from dgemma.evals import conversations, tasks
from dgemma.evals.measure import Checker, measure, summary
from dgemma.language_model import LanguageModel, load
from dgemma.memory import keep_freed_memory
from dgemma.model.lora import Lora, add_lora, pairs
from dgemma.model.network import DiffusionGemma
from dgemma.quant.modules import matrices
from dgemma.quant.quantize import Quantization
from dgemma.text.chat import ChatTemplate
from dgemma.text.tokenizer import Tokenizer
from dgemma.train.grow import grown
from dgemma.train.log import RunLog
from dgemma.train.loop import Run, read_state, train
from dgemma.train.options import Recipe
from dgemma.train.sources import levels_of, open_sources

FREE_TO_CHANGE = {
    "steps",
    "minutes",
    "save_every",
    "eval_every",
    "eval_items",
    "micro_batch",
    "checkpointing",
    "workers",
}
"""Options that a resumed run may have otherwise: they do not change what has been learnt so far."""
EVAL_SEED = 1 << 20
FROZEN = (
    "quantised weights cannot train: with lora (--lora RANK, or [lora] in the recipe) an adapter trains beside them"
)


def run(
    recipe: Recipe, out: Path, device: str = "auto", dtype: str = "auto", tensorboard: bool = False, png: bool = False
) -> Path:
    """Trains, or goes on where an earlier run in `out` ended; returns the directory of the result.

    That is out/adapter for LoRA and out/model otherwise, beside state.pt, log.jsonl and curves.png. ValueError for a
    recipe that does not fit the model, the data or the earlier run; OSError if something cannot be read or written.
    """
    if device in ("auto", "cpu"):
        keep_freed_memory()
    o = recipe.options
    state = read_state(out)
    asked = dataclasses.asdict(recipe)
    if state:
        _same(asked, state["recipe"], out)
    lm, folders = _begin(recipe, device, dtype)
    if lm.model.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # products of float32 in TF32, as is usual in training
    weights = _trainable(lm.model, recipe)
    going = Run(lm.model, o, weights)
    if state:
        going.resume(state)
    with RunLog(out, o.steps, going.step, tensorboard) as log, _stopping() as stopped:
        bad: list[str] = []
        mixture = open_sources(
            recipe.tasks,
            lm,
            o.limit,
            o.seed,
            lambda file, line: bad.append(f"{file}, line {line.number}: {line.reason}"),
        )
        for line in bad[:20]:
            log.note(line)
        if bad:
            log.note(f"{len(bad)} bad lines were left out" + (" (the first 20 are above)" if len(bad) > 20 else ""))
        evaluate = _evaluation(lm, recipe) if recipe.evaluate else None
        train(going, mixture, out, log, asked, evaluate, stopped)
    with going.averaged():
        result = _export(lm, recipe, folders, out)
    if png:
        from dgemma.train.curves import draw

        draw(out)
    return result


def _begin(recipe: Recipe, device: str, dtype: str) -> tuple[LanguageModel, tuple[Path, ...]]:
    """The model to start from, and the folders of its tokenizer and template."""
    if not recipe.scratch:
        if recipe.config:
            raise ValueError("config changes the network's sizes, which needs scratch = true")
        wish = None if recipe.quantize is None else Quantization(recipe.quantize)
        if wish and recipe.lora is None:
            raise ValueError(FROZEN)
        lm = load(recipe.model, device, dtype, wish)
        if recipe.layers:
            if recipe.lora is not None:
                raise ValueError("layers makes the model itself deeper, which an adapter cannot: leave lora out")
            lm = dataclasses.replace(lm, model=grown(lm.model, recipe.layers))
        return lm, folders_of(resolve(recipe.model))
    if recipe.layers:
        raise ValueError("layers makes a trained model deeper; with scratch, config.layer_types says how deep it is")
    if recipe.quantize is not None:
        raise ValueError(f"quantize = {recipe.quantize!r} has no effect with scratch: its weights are made, not read")
    # What ships without weights, for being trained here, is not yet a model by name.
    shipped = embedded.HERE / recipe.model
    directory = shipped if (shipped / "config.json").exists() else resolve(recipe.model)
    config = ModelConfig.from_file(directory / "config.json")
    unknown = recipe.config.keys() - {f.name for f in dataclasses.fields(config)}
    if unknown:
        raise ValueError(f"config.{min(unknown)} is not a field of the network's config")
    changes: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in recipe.config.items()
    }
    vision = config.vision if recipe.options.vision else None
    config = dataclasses.replace(config, **changes, vision=vision, dtype="float32")
    model = DiffusionGemma(config).init_weights(recipe.options.seed).to(resolve_device(device)).eval()
    tokenizer, template = Tokenizer.from_directory(directory), ChatTemplate.from_directory(directory)
    return LanguageModel(recipe.model, model, tokenizer, template, defaults_of([directory])), (directory,)


def _trainable(model: DiffusionGemma, recipe: Recipe) -> dict[str, nn.Parameter]:
    """The parameters that move, by name; all others are frozen."""
    model.requires_grad_(False)
    if matrices(model) and recipe.lora is None:
        raise ValueError(FROZEN)
    if pairs(model):
        raise ValueError(f"{recipe.model} is an adapter on quantised weights: `dgemma merge` it with plain ones first")
    if recipe.lora is not None:
        if recipe.options.vision:
            raise ValueError("vision = true has no effect with lora: an adapter leaves the image tower as it is")
        values = dict(recipe.lora)
        if "parts" in values:
            values["parts"] = tuple(values["parts"])
        add_lora(model, Lora(**values), recipe.options.seed)
        return {name: p for name, p in model.named_parameters() if p.requires_grad}
    if recipe.options.vision and model.vision is None:
        raise ValueError(f"vision = true has no effect: {recipe.model} has no image tower")
    kept = ["vision."] * (not recipe.options.vision) + ["router"] * (not recipe.options.router and not recipe.scratch)
    chosen = {name: p for name, p in model.named_parameters() if not any(part in name for part in kept)}
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    return chosen


def _evaluation(lm: LanguageModel, recipe: Recipe) -> Callable[[], Mapping[str, float]]:
    """Measures the model on what the recipe's `evaluate` names: tasks, by level, on held-out items, and files."""
    wanted: list[tuple[Checker, str, list[tasks.Item]]] = []
    count = recipe.options.eval_items
    for name in recipe.evaluate:
        if name.endswith(".jsonl"):
            wanted.append((conversations, Path(name).stem, conversations.read_items(name)[:count]))
            continue
        task, levels = levels_of(name)
        for level in levels:
            held_out = tasks.items(task, count, EVAL_SEED, held_out=True, level=level)
            wanted.append((task, f"{name.partition(':')[0]} {level}", held_out))

    def evaluate() -> Mapping[str, float]:
        figures: dict[str, float] = {}
        with torch.inference_mode():
            for task, name, held_out in wanted:
                last = summary(measure(lm, held_out, task))[-1]
                figures |= {f"exact/{name}": last.exact.share, f"valid/{name}": last.valid.share}
                figures[f"steps/{name}"] = last.steps
        return figures

    return evaluate


def _export(lm: LanguageModel, recipe: Recipe, folders: tuple[Path, ...], out: Path) -> Path:
    if recipe.lora is not None:
        save_adapter(lm.model, out / "adapter", recipe.model)
        return out / "adapter"
    save_model(lm.model, out / "model", lm.defaults, folders)
    return out / "model"


def _same(asked: dict[str, Any], earlier: dict[str, Any], out: Path) -> None:
    """ValueError if a run would go on with something that its first part did not have."""
    flat = lambda r: {k: v for k, v in (r | r["options"]).items() if k not in FREE_TO_CHANGE | {"options", "evaluate"}}  # noqa: E731
    now, then = flat(asked), flat(earlier)
    for name in now:
        if now[name] != then.get(name):
            raise ValueError(
                f"{out} holds a run with {name} = {then.get(name)!r}, not {now[name]!r}: "
                "go on with the same, or choose another --out"
            )


@contextmanager
def _stopping() -> Iterator[Callable[[], bool]]:
    """Turns the first SIGINT or SIGTERM into a wish to stop after the step; a second one stops at once."""
    asked: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    try:
        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread
        before = {}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
