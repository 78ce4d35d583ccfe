"""What a training run tells: log.jsonl for the tools, TensorBoard if asked for, and a bar or plain lines for a person.

A line of log.jsonl is {"step", "seconds", means of the last few steps…} or {"step", "eval": {name: figure}}.
Importing this imports neither torch nor rich.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress
    from torch.utils.tensorboard import SummaryWriter

QUARTERS = tuple(f"level/{i}" for i in range(4))
"""Mean losses of the canvases whose noise level lies in each quarter of 0 … 1."""

SECONDS_A_LINE = 30
MEMORY = 0.98  # a smoothed figure remembers about 50 steps


class RunLog:
    """The log of one training run in `directory`, used in a `with` statement.

    start: steps that an earlier run has done and saved; what it logged after them is dropped, since those steps come
    again. every: steps a line of log.jsonl. Raises ValueError if TensorBoard is asked for and not installed, and
    OSError that names the file if it cannot be written.
    """

    def __init__(
        self,
        directory: Path,
        total_steps: int,
        start: int = 0,
        tensorboard: bool = False,
        out: TextIO | None = None,
        every: int = 10,
        clock: Callable[[], float] = time.monotonic,
    ):
        if every < 1:
            raise ValueError(f"a line of the log stands for at least 1 step, not {every}")
        self.file, self.events = directory / "log.jsonl", directory / "tensorboard"
        self.total_steps, self.every, self.clock = total_steps, every, clock
        self._out = out or sys.stderr
        # Before anything is written: it may not be installed.
        self._writer = _summary_writer(self.events, start) if tensorboard else None
        with telling(self.file):
            directory.mkdir(parents=True, exist_ok=True)
            if self.file.exists():
                keep_until(self.file, start)
        self._bar: Progress | None = None
        self._start = self._step = start
        self._begun = self._mark = self._told_at = clock()
        self._told = self._written = start  # the last step that a person and the file know of
        self._smooth: dict[str, float] = {}
        self._gathered: dict[str, list[float]] = {}

    def __enter__(self) -> Self:
        if self._out.isatty():
            self._bar = _bar(self._out, self._start, self.total_steps)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._step > self._written:
                self._write_means()
        finally:
            if self._bar:
                self._bar.stop()
            elif self._step > self._told:
                self._tell()
            if self._writer:
                with telling(self.events):
                    self._writer.close()

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Takes the figures of training step `step`, which counts from 1. "loss" and "examples" are always there.

        A figure that a step does not have, such as the loss of a noise level that was not drawn, is left out.
        """
        if step <= self._step:
            raise ValueError(f"step {step} is recorded, but step {self._step} was already done")
        now = self.clock()
        measured = {**values, "seconds": now - self._mark}
        self._step, self._mark = step, now
        keep = min(MEMORY, 1 - 1 / (step - self._start))
        for name, value in measured.items():
            self._gathered.setdefault(name, []).append(value)
            self._smooth[name] = keep * self._smooth.get(name, value) + (1 - keep) * value
        if step % self.every == 0:
            self._write_means()
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=step, description=" · ".join(self._figures()))
        elif now - self._told_at >= SECONDS_A_LINE:
            self._tell()

    def evaluated(self, step: int, values: Mapping[str, float]) -> None:
        """Takes the figures of an evaluation after step `step`. Its time does not count as that of a training step."""
        self._write(step, {"eval": _plain(values)})
        self._chart(step, {f"eval/{name}": value for name, value in values.items()})
        self._mark = self.clock()

    def note(self, text: str) -> None:
        """A line for the person, above the bar."""
        if self._bar:
            from rich.text import Text

            self._bar.console.print(Text(text))
        else:
            print(text, file=self._out, flush=True)

    def _write_means(self) -> None:
        means = {name: sum(values) / len(values) for name, values in self._gathered.items() if name != "seconds"}
        seconds = sum(self._gathered["seconds"])
        means["examples_per_second"] = sum(self._gathered["examples"]) / max(1e-9, seconds)
        self._written, self._gathered = self._step, {}  # first, so that an error below is not met again at the end
        self._write(self._step, {"seconds": round(self.clock() - self._begun, 2), **_plain(means)})
        self._chart(self._step, means)

    def _write(self, step: int, entry: Mapping[str, Any]) -> None:
        with telling(self.file), self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **entry}) + "\n")

    def _chart(self, step: int, values: Mapping[str, float]) -> None:
        if self._writer:
            with telling(self.events):
                for name, value in values.items():
                    self._writer.add_scalar(name, value, step)

    def _figures(self) -> list[str]:
        losses = [f"{name} {self._smooth[name]:.3f}" for name in ("loss", "causal") if name in self._smooth]
        rate = self._smooth["examples"] / max(1e-9, self._smooth["seconds"])
        return [*losses, f"{rate:.{0 if rate >= 10 else 2}f} examples/s"]

    def _tell(self) -> None:
        self._told, self._told_at = self._step, self.clock()
        elapsed = self._told_at - self._begun
        left = elapsed / (self._step - self._start) * (self.total_steps - self._step)
        times = [f"{_duration(elapsed)} elapsed", f"{_duration(left)} left"]
        self.note(" · ".join([f"step {self._step}/{self.total_steps}", *self._figures(), *times]))


def read_entries(path: Path) -> list[dict[str, Any]]:
    """The lines of a log.jsonl. The last one is passed over if it is torn: its writer was killed, or is at it now."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    entries: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
    return entries


def keep_until(path: Path, step: int) -> None:
    """Drops what a log says of later steps, at once or not at all; of all steps if none has been done."""
    kept = [entry for entry in read_entries(path) if entry["step"] <= step] if step else []
    new = path.with_suffix(".new")
    new.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
    os.replace(new, path)


@contextmanager
def telling(path: Path) -> Iterator[None]:
    """Gives an OSError the name of the file that was being written, and says what to do."""
    try:
        yield
    except OSError as error:
        advice = "make room or choose another directory; a training run then goes on from its last saved state"
        raise OSError(error.errno, f"cannot be written: {error.strerror or error}; {advice}", str(path)) from error


def _plain(values: Mapping[str, float]) -> dict[str, float | None]:
    """Six digits are enough for a curve; JSON knows neither infinity nor NaN."""
    return {name: float(f"{value:.6g}") if math.isfinite(value) else None for name, value in values.items()}


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _summary_writer(directory: Path, start: int) -> "SummaryWriter":
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("TensorBoard logs need the extra: pip install 'dgemma[train]'") from None
    with telling(directory):
        return SummaryWriter(str(directory), purge_step=start + 1 if start else 0, flush_secs=SECONDS_A_LINE)


def _bar(out: TextIO, start: int, total: int) -> "Progress | None":
    """A bar that is already drawn; None if the terminal cannot redraw a line."""
    from rich import progress
    from rich.console import Console
    from rich.table import Column

    console = Console(file=out)
    if console.is_dumb_terminal:
        return None
    whole = Column(no_wrap=True)  # only the bar gives way on a narrow terminal
    bar = progress.Progress(
        progress.MofNCompleteColumn(table_column=whole),
        progress.BarColumn(bar_width=None),
        progress.TextColumn("{task.description}", markup=False),
        progress.TimeElapsedColumn(table_column=whole),
        progress.TimeRemainingColumn(table_column=whole),
        console=console,
        expand=True,
        refresh_per_second=2,
        speed_estimate_period=600,
        redirect_stdout=sys.stdout.isatty(),  # else a pipe's text would go to the terminal
    )
    bar.add_task("", total=total, completed=start)
    bar.start()
    return bar
