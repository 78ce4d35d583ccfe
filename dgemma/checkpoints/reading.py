"""Bytes of stored tensors, straight into memory, so that nothing of a file stays mapped."""

from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, Self

import torch
from torch import Tensor

from dgemma.checkpoints.headers import StoredTensor

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
CODES = {"F8_E4M3": torch.uint8, "U8": torch.uint8, "I8": torch.int8, "I32": torch.int32, "I64": torch.int64}
"""Float8 codes are taken as bytes."""


class Reader:
    """Keeps the file that it read last open."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()

    def into(self, entry: StoredTensor, out: Tensor) -> None:
        """Fills a contiguous CPU tensor of as many bytes."""
        if self._file is None or self._path != entry.file:
            self.__exit__()
            self._path, self._file = entry.file, entry.file.open("rb", buffering=0)
        self._file.seek(entry.begin)
        left = memoryview(out.view(-1).view(torch.uint8).numpy().data)
        while len(left):
            count = self._file.readinto(left)  # type: ignore[attr-defined]
            if not count:
                raise ValueError(f"{entry.file} is cut short at byte {self._file.tell()}; download it again")
            left = left[count:]

    def tensor(self, entry: StoredTensor) -> Tensor:
        out = torch.empty(entry.shape, dtype=DTYPES.get(entry.dtype) or CODES[entry.dtype])
        if out.numel():
            self.into(entry, out)
        return out


def slices(entry: StoredTensor) -> list[StoredTensor]:
    """A stored stack's matrices one by one."""
    size = entry.bytes // entry.shape[0]
    return [
        replace(entry, shape=entry.shape[1:], begin=entry.begin + i * size, end=entry.begin + (i + 1) * size)
        for i in range(entry.shape[0])
    ]
