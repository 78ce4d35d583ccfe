"""The network into a model directory that transformers, and this package, load."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dgemma.checkpoints import compressed
from dgemma.checkpoints.headers import INDEX, SINGLE
from dgemma.checkpoints.names import stored_name
from dgemma.checkpoints.source import holder
from dgemma.config import GenerationConfig
from dgemma.model.lora import Pair
from dgemma.model.network import DiffusionGemma
from dgemma.quant.modules import matrices

EXTRAS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "processor_config.json")
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def save_model(
    model: DiffusionGemma,
    directory: str | Path,
    generation_config: GenerationConfig,
    extras: Sequence[Path] = (),
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes config.json, generation_config.json and the weights under their released names, in their own dtype.

    Quantised matrices are written in the layout of compressed-tensors, experts one by one.

    extras: folders from which tokenizer, chat template and processor config are copied, each from the first that has
    it. ValueError for a network whose adapter is not merged.
    Every file is written beside its place first, and all move there at the end: a save that fails, with OSError,
    leaves what was there, and a network still mapped from the same directory stays whole. Weights of an earlier save
    are then removed.
    """
    if adapted := [name for name, module in model.named_modules() if isinstance(module, Pair)]:
        raise ValueError(f"{adapted[0]} is an adapter that is not merged: merge it, or save it as an adapter")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with replacing(directory) as new:
        weights = _write_weights(model, new, max_shard_bytes)
        write_json(new("config.json"), _config(model))
        write_json(new("generation_config.json"), generation_config.to_dict())
        for name in EXTRAS if extras else ():
            found = holder(extras, name) / name
            if found.is_file():
                shutil.copyfile(found, new(name))
    for path in directory.iterdir():
        if _WEIGHTS.fullmatch(path.name) and path.name not in weights:
            path.unlink()


def _config(model: DiffusionGemma) -> dict:
    dtype = str(model.dtype).removeprefix("torch.")
    values = model.config.to_dict() | {"dtype": dtype}
    for part in ("text_config", "vision_config"):
        if values[part]:
            values[part] = values[part] | {"dtype": dtype}
    quantised = {"quantization_config": compressed.quantization_config(model)} if matrices(model) else {}
    return values | quantised


def _write_weights(model: DiffusionGemma, new: Callable[[str], Path], max_shard_bytes: int) -> set[str]:
    """Writes one file, or shards and their index; returns the names of the files."""
    shards: list[dict[str, int]] = [{}]
    filled = 0
    for name, tensor in _released(model):
        if shards[-1] and filled + tensor.nbytes > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor.nbytes
        filled += tensor.nbytes
    # Twice, so that no more than a shard is held of what has to be made for the file.
    tensors = _released(model)
    if len(shards) == 1:
        write_tensors(new(SINGLE), dict(tensors))
        return {SINGLE}
    files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        write_tensors(new(file), dict(islice(tensors, len(shard))))
    total = sum(size for shard in shards for size in shard.values())
    where = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    write_json(new(INDEX), {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))})
    return {*files, INDEX}


def _released(model: DiffusionGemma) -> Iterator[tuple[str, Tensor]]:
    packed = matrices(model)
    inside = tuple(f"{name}." for name in packed)
    for name, tensor in model.state_dict().items():
        if not name.startswith(inside):
            yield stored_name(name), tensor
    for name, matrix in packed.items():
        yield from compressed.stored_tensors(name, matrix)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """One safetensors file; a failure is an OSError that names the directory."""
    # One shard at a time leaves the device; the metadata is what transformers looks for.
    on_host = {name: tensor.to(torch.device("cpu")).contiguous() for name, tensor in tensors.items()}
    try:
        save_file(on_host, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"cannot write {path.parent}: {error}") from None


def write_json(path: Path, values: dict) -> None:
    """A JSON file with its keys in order."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def replacing(directory: Path) -> Iterator[Callable[[str], Path]]:
    """Gives temporary paths for the names of new files; they take their places at the end, or vanish on an error.

    One of them must be a config, whose mode they all get.
    """
    pending: dict[str, Path] = {}

    def new(name: str) -> Path:
        return pending.setdefault(name, directory / f".{name}.{os.getpid()}.new")

    try:
        yield new
        # safetensors makes its files for their owner alone; they get the mode of the others.
        usual = next(path for name, path in pending.items() if name.endswith("config.json"))
        for path in pending.values():
            shutil.copymode(usual, path)
        for name, path in pending.items():
            os.replace(path, directory / name)
    finally:
        for path in pending.values():
            path.unlink(missing_ok=True)
