"""What commands share: flags made from GenerationConfig, the error of a wrong call. Importing this imports no torch."""

import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dgemma import embedded
from dgemma.checkpoints.source import defaults_of, folders_of, resolve
from dgemma.config import GenerationConfig, MediaConfig

if TYPE_CHECKING:
    from dgemma.constraints.compile import Constraint
    from dgemma.language_model import LanguageModel

ALIASES = {"max_new_tokens": ("-n",), "max_denoising_steps": ("--steps",)}

Model = Annotated[str, typer.Argument(help="embedded name, directory, GGUF file or hub id")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N")]
Dtype = Annotated[Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="auto: the file's own")]

Format = Literal["int8", "fp8", "int4", "w4a8", "nvfp4"]
Quantize = Annotated[
    Format | None,
    typer.Option(help="keep attention, dense MLPs and experts in fewer bits, quantised while they are read"),
]

KVCache = Annotated[
    Literal["int8", "fp8"] | None,
    typer.Option(
        "--kv-cache", help="keep keys and values of encoded tokens in 8 bits", show_default="the model's dtype"
    ),
]


Images = Annotated[
    list[Path] | None, typer.Option("--image", help="FILE to show before the prompt; may be given again")
]
Videos = Annotated[
    list[Path] | None, typer.Option("--video", help="FILE of which frames are shown; may be given again")
]


class UsageError(Exception):
    """What was asked for makes no sense, whatever the model; exit code 2."""


def flags_of(options: type, parameter: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator: the command gets a flag for each field of a dataclass that has a help text.

    What was given arrives as a dictionary, in the argument named `parameter`.
    """
    known = [f for f in fields(options) if f.type in (int, float, str, bool) and "help" in f.metadata]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def with_flags(**values: Any) -> None:
            given = {f.name: values.pop(f.name) for f in known}
            command(**values, **{parameter: {name: value for name, value in given.items() if value is not None}})

        own = [p for p in inspect.signature(command).parameters.values() if p.name != parameter]
        flags = []
        for f in known:
            names = () if f.type is bool else (f"--{f.name.replace('_', '-')}", *ALIASES.get(f.name, ()))
            option = typer.Option(*names, help=f.metadata["help"], show_default=str(f.default))
            kind: Any = Annotated[f.type | None, option]  # type: ignore[operator]
            flags.append(inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind))
        with_flags.__signature__ = inspect.Signature([*own, *flags])  # type: ignore[attr-defined]
        with_flags.__name__, with_flags.__doc__ = command.__name__, command.__doc__
        return with_flags

    return decorate


config_flags = flags_of(GenerationConfig, "config")
media_flags = flags_of(MediaConfig, "media")


def checked(model: str, config: dict[str, Any]) -> Path:
    """The model's directory, once its own defaults agree with the options given."""
    directory = resolve(model)
    defaults = defaults_of(folders_of(directory))
    try:
        defaults.with_options(**config)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return directory


def load_checked(
    model: str,
    directory: Path,
    device: str,
    dtype: str,
    quantize: str | None = None,
    kv_cache: str | None = None,
) -> "LanguageModel":
    """The model of `checked`; one that ships keeps its name."""
    from dgemma.language_model import load

    return load(model if directory.parent == embedded.HERE else directory, device, dtype, quantize, kv_cache)


def check_folders(*files: Path | None) -> None:
    """UsageError if a file could not be written because its folder does not exist; None stands for no file."""
    for file in files:
        if file and not file.absolute().parent.is_dir():
            raise UsageError(f"there is no folder {file.parent} to write {file.name} to")


def constraint_of(
    schema: str | None, regex: str | None, choices: Sequence[str] | None, grammar: Path | None
) -> "Constraint | None":
    """What an answer is to keep to; UsageError for more than one of them, or one that cannot be kept to."""
    given = [value for value in (schema, regex, choices or None, grammar) if value is not None]
    if not given:
        return None
    if len(given) > 1:
        raise UsageError("--schema, --regex, --choice and --grammar exclude each other")
    from dgemma.constraints.compile import node_of
    from dgemma.constraints.grammar import grammar as read_grammar

    constraint: Any = regex if regex is not None else choices
    try:
        if grammar is not None:
            constraint = read_grammar(grammar.read_text("utf-8"))
        elif schema is not None:
            constraint = json.loads(schema if schema.lstrip().startswith("{") else Path(schema).read_text("utf-8"))
        node_of(constraint)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return constraint
