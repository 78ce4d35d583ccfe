"""The scheduler on a thread of its own: any thread submits, cancels and waits; events come as they happen."""

import queue
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

from dgemma.decoding.blocks import Request
from dgemma.decoding.events import Event, Finished
from dgemma.engine.scheduler import Job, Limits, Scheduler
from dgemma.model.network import DiffusionGemma


class Closed(RuntimeError):  # noqa: N818
    """The engine takes no more requests."""


class Engine:
    """Runs requests together on one model; a context manager that drains at its end.

    Events are handed to `take` on the engine's thread: it should only pass them on.
    """

    def __init__(self, model: DiffusionGemma, limits: Limits | None = None):
        self.scheduler = Scheduler(model, limits or Limits())
        self._changed = threading.Condition()
        self._closing = self._stopped = False
        self._thread = threading.Thread(target=self._run, name="dgemma-engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(drain=error is None)

    def submit(
        self, request: Request, take: Callable[[Event], None], ended: Callable[[Exception | None], None], salt: str = ""
    ) -> Job:
        """Queues a request. `ended` is called once, after its last event, with the error that ended it or None.

        Raises ValueError for one that could never run, QueueFull, or Closed.
        """
        with self._changed:
            if self._closing:
                raise Closed("the engine is closing and takes no more requests")
            job = self.scheduler.submit(request, take, ended, salt)
            self._changed.notify_all()
        return job

    def cancel(self, job: Job) -> None:
        """Lets a request go: its row is free within one step, and `ended` is called with None."""
        with self._changed:
            self.scheduler.cancel(job)
            self._changed.notify_all()

    def stream(self, request: Request, salt: str = "") -> Iterator[Event]:
        """The events of one request as they come; a caller who stops iterating cancels it."""
        arrived: queue.SimpleQueue[Event | Exception | None] = queue.SimpleQueue()
        job = self.submit(request, arrived.put, arrived.put, salt)
        try:
            while (event := arrived.get()) is not None:
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            self.cancel(job)

    def generate(self, request: Request, salt: str = "") -> Finished:
        *_, last = self.stream(request, salt)
        assert isinstance(last, Finished)
        return last

    def close(self, drain: bool = True) -> None:
        """Takes no more requests and returns when those in work are done, or, without `drain`, cancelled."""
        with self._changed:
            self._closing = True
            if not drain:
                for job in self.scheduler.jobs():
                    self.scheduler.cancel(job)
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or not self.scheduler.idle)
                if self.scheduler.idle:
                    return
            try:
                self.scheduler.step()
            except Exception as error:  # of no job in particular: none of them can be trusted to end
                self.scheduler.fail(error)
