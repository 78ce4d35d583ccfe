"""What a training run is asked for: a recipe in TOML, and the options that the command line takes too."""

import dataclasses
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

RECIPES = Path(__file__).parent / "recipes"


def option(default: Any, help: str, least: float = 0, most: float = float("inf")) -> Any:
    return field(default=default, metadata={"help": help, "least": least, "most": most})


@dataclass(frozen=True)
class TrainOptions:
    """How long, how fast and on what loss. ValueError for a value out of its range, by name."""

    steps: int = option(1000, "steps of the optimiser")
    minutes: float = option(0.0, "end after so many minutes, earlier runs counted in; 0: no limit")
    batch: int = option(8, "examples a step", least=1)
    micro_batch: int = option(0, "examples at once, gradients adding up to a step; 0: all")
    canvases: int = option(1, "noised canvases drawn of each example", least=1)
    limit: int = option(4096, "most tokens of an example; longer answers are cut", least=1)
    optimizer: str = option("adam", "adam, or muon for matrices and adam for the rest")
    learning_rate: float = option(1.5e-4, "peak rate of adam")
    muon_rate: float = option(0.02, "peak rate of muon")
    warmup: int = option(100, "steps until the peak rate; after it a cosine falls to a twentieth")
    clip: float = option(1.0, "largest norm of the gradient; 0: any")
    ema: float = option(0.0, "share that averaged weights keep in a step, below 1; 0: no averaging", most=0.99999)
    causal: float = option(1.0, "weight of the left-to-right loss")
    conditioning: float = option(0.5, "share of canvases with self-conditioning", most=1)
    infill: float = option(0.0, "share of canvases that are clean but for one gap", most=1)
    exponent: float = option(1.0, "noise level = uniform ^ exponent; below 1: more noise", least=0.01)
    rollout: float = option(0.0, "share of canvases taken from the model's own denoising", most=1)
    rollout_steps: int = option(8, "most steps of that denoising", least=1)
    leave_one_out: bool = option(False, "leave-one-out cross-entropy")
    router: bool = option(False, "train the router too; with scratch it always is")
    vision: bool = option(False, "train the image tower too; with scratch there is none otherwise")
    checkpointing: bool = option(False, "recompute activations instead of keeping them")
    autocast: bool = option(False, "products in bfloat16, weights and their gradients as they are; on CUDA")
    workers: int = option(0, "processes that prepare batches; 0: none but the trainer")
    seed: int = option(0, "of data order and noise", most=2**63 - 1)
    save_every: int = option(200, "steps between checkpoints", least=1)
    eval_every: int = option(0, "steps between evaluations; 0: only at the end")
    eval_items: int = option(50, "held-out items of each level in an evaluation")

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value, kind = getattr(self, f.name), f.type
            if kind is float and type(value) is int:
                object.__setattr__(self, f.name, float(value))
            elif type(value) is not kind:
                raise ValueError(f"{f.name} must be {kind.__name__}, not {value!r}")  # type: ignore[union-attr]
            if kind in (int, float) and not f.metadata["least"] <= value <= f.metadata["most"]:
                raise ValueError(f"{f.name} must lie in {f.metadata['least']} … {f.metadata['most']}, not {value}")
        if self.optimizer not in ("adam", "muon"):
            raise ValueError(f"optimizer must be adam or muon, not {self.optimizer!r}")
        if self.rollout and self.leave_one_out:
            raise ValueError("rollout and leave_one_out exclude each other: a rolled-out canvas has no noise level")


@dataclass(frozen=True)
class Recipe:
    """A whole run.

    model: what to start from; scratch: its config and tokenizer only, with random weights; config: fields of its
    config.json's text part to change, with `scratch`; layers: how deep the model is made before it trains on, 0 for as
    deep as it is; tasks: weights of the sources of examples, each a task's name or
    "NAME:LEVEL" or a JSONL file; evaluate: sources of held-out items; lora: its fields, None for all weights; quantize:
    the format that the model's own weights are kept in beside a LoRA, as `dgemma.load` takes it.
    """

    model: str
    tasks: dict[str, float]
    evaluate: tuple[str, ...] = ()
    scratch: bool = False
    config: dict[str, Any] = field(default_factory=dict)
    layers: int = 0
    lora: dict[str, Any] | None = None
    quantize: str | None = None
    options: TrainOptions = TrainOptions()

    @classmethod
    def from_toml(cls, source: str | Path) -> Self:
        """A recipe from a file, or one that ships, by name. ValueError names the file and what is wrong in it."""
        path = shipped(str(source)) or Path(source)
        try:
            values = tomllib.loads(path.read_text("utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: {error}") from None
        known = {f.name for f in dataclasses.fields(cls)} - {"options"} | {"train"}
        unknown = sorted(values.keys() - known)
        if unknown:
            raise ValueError(f"{path}: {unknown[0]} is not known; a recipe holds {', '.join(sorted(known))}")
        missing = sorted({"model", "tasks"} - values.keys())
        if missing:
            raise ValueError(f"{path}: {missing[0]} is missing")
        train = values.pop("train", {})
        unknown = sorted(train.keys() - {f.name for f in dataclasses.fields(TrainOptions)})
        if unknown:
            raise ValueError(f"{path}: train.{unknown[0]} is not an option; `dgemma train --help` lists them")
        try:
            return cls(**values | {"evaluate": tuple(values.get("evaluate", ()))}, options=TrainOptions(**train))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None

    def with_changes(self, **changes: Any) -> "Recipe":
        return dataclasses.replace(self, **changes)

    def with_options(self, **changes: Any) -> "Recipe":
        return dataclasses.replace(self, options=dataclasses.replace(self.options, **changes))


def shipped(name: str) -> Path | None:
    """The file of a recipe that ships with the package."""
    path = RECIPES / f"{name}.toml"
    return path if name in {p.stem for p in RECIPES.glob("*.toml")} else None
