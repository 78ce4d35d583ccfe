"""What every request of a server does, as a trace in a file; see docs/trace.md."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import count
from typing import Any, BinaryIO

from dgemma.decoding.blocks import Request
from dgemma.decoding.events import Event, Finished
from dgemma.decoding.trace import Header, Writer
from dgemma.engine.engine import Ended, Take
from dgemma.language_model import LanguageModel
from dgemma.terminal.replay import describer

log = logging.getLogger("dgemma.serve")


class Recorder:
    """Writes events as they happen; rows are the numbers of the engine's jobs. Any thread may call it.

    The autoregressive mode has no jobs: its rows are -1, -2, … A file that cannot be written ends the trace, not the
    requests.
    """

    def __init__(self, file: BinaryIO, name: str, lm: LanguageModel):
        sizes = lm.model.config
        header = Header(name, sizes.vocab_size, sizes.canvas_length, asdict(lm.defaults), 0, [])
        self._lock, self._numbers, self._failed = threading.Lock(), count(-1, -1), False
        with self._written():
            self._writer = Writer(file, header, describer(lm.tokenizer))

    def watched(self, request: Request, take: Take, ended: Ended) -> tuple[Request, Take, Ended]:
        """The same request for the engine, with its events written before they are passed on."""
        row = _Row(self, request, {})

        def took(event: Event) -> None:
            row.write(event)
            take(event)

        def over(error: Exception | None) -> None:
            row.end("" if error is None else f"{type(error).__name__}: {error}")
            ended(error)

        return request, took, over

    def autoregressive(self, request: Request, events: Iterator[Event], temperature: float) -> Iterator[Event]:
        """The same for events that come from outside the engine."""
        number = next(self._numbers)
        row = _Row(self, request, {"autoregressive": True, "temperature": temperature})
        error = ""
        try:
            for event in events:
                row.write(replace(event, row=number))
                yield event
        except Exception as problem:
            error = f"{type(problem).__name__}: {problem}"
            raise
        finally:
            row.end(error)

    def write(self, change: Callable[[Writer], None]) -> None:
        if not self._failed:
            with self._lock, self._written():
                change(self._writer)

    @contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # ValueError: the file is closed
            self._failed = True
            log.error("the trace ends here: %s", error)


class _Row:
    """The lines of one request. One that never came to an event has none."""

    def __init__(self, recorder: Recorder, request: Request, mode: dict[str, Any]):
        self.recorder, self.request, self.mode = recorder, request, mode
        self.number: int | None = None
        self.finished = False

    def write(self, event: Event) -> None:
        if self.number is None:
            self.number = event.row
            asked = (asdict(self.request.options) | self.mode, self.request.noise.seed, self.request.prompt.tolist())
            self.recorder.write(lambda writer: writer.request(event.row, *asked))
        self.finished = isinstance(event, Finished)
        self.recorder.write(lambda writer: writer.write(event))

    def end(self, error: str) -> None:
        number = self.number
        if number is not None and not self.finished:
            self.recorder.write(lambda writer: writer.ended(number, error))
