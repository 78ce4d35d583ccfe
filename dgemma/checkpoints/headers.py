"""Which tensors a model directory holds, from the headers of its safetensors files alone. Needs no torch."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgemma.config import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_LFS = b"version https://git-lfs"


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies. dtype: safetensors' name for it, such as "BF16"; begin, end: bytes of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def bytes(self) -> int:
        return self.end - self.begin


def model_json(directory: Path, name: str = "config.json") -> dict[str, Any]:
    """One of the directory's JSON files; a missing one is a FileNotFoundError that says what a model needs."""
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is not a directory")
    if not (directory / name).is_file():
        raise FileNotFoundError(f"{directory} holds no {name}: it is not a model directory")
    return read_json(directory / name)


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of the directory, by stored name.

    Raises OSError for a missing file, ValueError for a damaged one or an index at odds with its shards.
    """
    if (directory / SINGLE).exists():
        return read_header(directory / SINGLE)
    if not (directory / INDEX).exists():
        raise FileNotFoundError(f"{directory} holds neither {SINGLE} nor {INDEX}")
    where = read_json(directory / INDEX).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(file, str) for file in where.values()):
        raise ValueError(f"{directory / INDEX} has no weight_map from tensors to files")
    files = sorted(set(where.values()))
    missing = [file for file in files if not (directory / file).exists()]
    if missing:
        raise FileNotFoundError(f"{directory} lacks {listed(missing, 'shard')} that {INDEX} names")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        held = read_header(directory / file)
        absent = [name for name, home in where.items() if home == file and name not in held]
        if absent:
            raise ValueError(f"{directory / file} lacks {listed(absent, 'tensor')} that {INDEX} says it holds")
        tensors |= {name: tensor for name, tensor in held.items() if where.get(name, file) == file}
    return tensors


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file. Raises ValueError where the file is cut short or something else."""
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        size = os.fstat(file.fileno()).st_size
        if _LFS.startswith(start) and len(start) == 8:
            raise ValueError(f"{path} is a git-lfs pointer, not the weights; fetch them with `git lfs pull`")
        if len(start) < 8 or length > size - 8:
            raise ValueError(f"{path} is no safetensors file, or it is cut short at {size} bytes; download it again")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        tensors = {
            name: StoredTensor(
                path,
                str(entry["dtype"]),
                tuple(map(int, entry["shape"])),
                *(8 + length + int(offset) for offset in entry["data_offsets"]),
            )
            for name, entry in header.items()
        }
        promised = max((tensor.end for tensor in tensors.values()), default=8 + length)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"{path} is damaged: its safetensors header cannot be read; download it again") from None
    if promised != size:
        raise ValueError(f"{path} is damaged: {size} bytes where its header promises {promised}; download it again")
    return tensors


def listed(names: list[str], kind: str, most: int = 4) -> str:
    """ "2 tensors (a, b)": how many, and the first few by name."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} {kind}{'s' if len(names) > 1 else ''} ({', '.join(names[:most])}{more})"
