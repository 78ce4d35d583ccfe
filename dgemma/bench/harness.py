"""One harness for every comparison: each side in a process of its own, asked one question after the other.

A side is a class in a module of its own, `module:Class`, made from a dictionary of options; its public methods are the
questions. What it imports and allocates is its own, so start-up and peak memory are too.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module, metadata, util
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Self
from zipfile import ZipFile

KEEP_FREED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "8000000000"}
"""The environment of a side whose malloc gives no memory back."""


def cores() -> int:
    """Cores this process may run on; torch's own default counts the same."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Spread:
    """What repeats of one measurement gave."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        return cls(median(values), min(values), max(values))


@contextmanager
def unpacked(package: Path) -> Iterator[dict[str, str]]:
    """The environment of a side that runs another state of this project: a wheel, or a folder that holds dgemma/.

    ValueError if there is none in it.
    """
    with tempfile.TemporaryDirectory(prefix="dgemma-bench-") as folder:
        if package.suffix == ".whl" and package.is_file():
            with ZipFile(package) as wheel:
                wheel.extractall(folder)
        root = Path(folder) if package.suffix == ".whl" else package.resolve()
        if not (root / "dgemma" / "bench" / "sides.py").exists():
            raise ValueError(f"{package} is no wheel of dgemma, nor a folder that holds dgemma/")
        yield {"PYTHONPATH": str(root)}


class Side:
    """The process of one side. `ready_s` is the time from its start until it was made."""

    def __init__(self, name: str, target: str, options: Mapping[str, Any], env: Mapping[str, str] | None = None):
        self.name = name
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        started = perf_counter()
        here = ["-P"] if "PYTHONPATH" in (env or {}) else []  # else the working directory would come before it
        self._process = subprocess.Popen(
            [sys.executable, *here, "-m", "dgemma.bench.harness", target, json.dumps(dict(options))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, **(env or {})},
            text=True,
        )
        self._answer()
        self.ready_s = perf_counter() - started

    def ask(self, question: str, **arguments: Any) -> Any:
        """The answer of the side's method of this name. Raises OSError, with its last words, if the side ended."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps([question, arguments]) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Ends the process; closing twice does nothing."""
        if not self._errors.closed:
            self._process.communicate()
            self._errors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._process.wait()
        self._errors.seek(0)
        words = self._errors.read().strip().splitlines() or ["it said nothing"]
        raise OSError(f"the process of {self.name} ended: {words[-1]}")


def serve(target: str, options: str) -> None:
    """The other end of `Side`: makes the target, then answers a line of JSON with a line of JSON."""
    # Whatever a library prints goes to the errors; the answers have the old standard output to themselves.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        module, name = target.split(":")
        side = getattr(import_module(module), name)(**json.loads(options))
        print("true", file=answers, flush=True)
        for line in sys.stdin:
            question, arguments = json.loads(line)
            print(json.dumps(getattr(side, question)(**arguments)), file=answers, flush=True)


def have_transformers(progress: Callable[[str], None]) -> bool:
    """Whether there is something to compare with; tells if not."""
    found = util.find_spec("transformers") is not None
    if not found:
        progress("transformers is not installed: this project is measured alone")
    return found


def versions(theirs: bool) -> dict[str, str]:
    """What was measured, by package; `theirs`: transformers too."""
    return {name: metadata.version(name) for name in ("torch", *["transformers"] * theirs)}


def peak_bytes() -> int | None:
    """The most memory this process has held, mapped files included; None where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    return int(lines["VmHWM"].split()[0]) * 1024


def machine() -> str:
    """The processor, in words, and how many cores this process may use."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if (info.exists())
        else []
    )
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


if __name__ == "__main__":
    serve(*sys.argv[1:])
