"""The scheduler on a thread of its own: any thread submits, cancels and waits; events come as they happen."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self, TypeVar

from dgemma.decoding.blocks import Request
from dgemma.decoding.events import Event, Finished
from dgemma.engine.scheduler import Job, Limits, QueueFull, Scheduler
from dgemma.model.network import DiffusionGemma

T = TypeVar("T")
Take = Callable[[Event], None]
Ended = Callable[[Exception | None], None]


class Closed(RuntimeError):  # noqa: N818
    """The engine takes no more requests."""


class Engine:
    """Runs requests together on one model; a context manager that drains at its end.

    Events are handed to `take` on the engine's thread: it should only pass them on.
    """

    def __init__(self, model: DiffusionGemma, limits: Limits | None = None):
        self.scheduler = Scheduler(model, limits or Limits())
        self._changed = threading.Condition()
        self._closing = False
        self._tasks: list[tuple[Future[Any], Callable[[], Any]]] = []
        self._thread = threading.Thread(target=self._run, name="dgemma-engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(drain=error is None)

    def submit(self, request: Request, take: Take, ended: Ended, salt: str = "") -> Job:
        """Queues a request. `ended` is called once, after its last event, with the error that ended it or None.

        Raises ValueError for one that could never run, QueueFull, or Closed.
        """
        return self.submit_all([(request, take, ended)], salt)[0]

    def submit_all(self, requests: Sequence[tuple[Request, Take, Ended]], salt: str = "") -> list[Job]:
        """Queues all of them or, with the error of `submit`, none."""
        most = self.scheduler.limits.waiting
        if len(requests) > most:
            raise ValueError(f"{len(requests)} answers were asked for at once; the queue has room for {most}")
        jobs: list[Job] = []
        with self._changed:
            self._check_open()
            waiting = self.scheduler.queued  # others only take away from it
            if waiting + len(requests) > most:
                raise QueueFull(f"{waiting} requests are waiting, of at most {most}; try again later")
            try:
                for request, take, ended in requests:
                    jobs.append(self.scheduler.submit(request, take, ended, salt))
            except ValueError:
                for job in jobs:
                    self.scheduler.cancel(job)
                raise
            finally:
                self._changed.notify_all()
        return jobs

    def run(self, function: Callable[[], T]) -> Future[T]:
        """Calls a function on the engine's thread between two steps: there it may use the model. Raises Closed."""
        future: Future[T] = Future()
        with self._changed:
            self._check_open()
            self._tasks.append((future, function))
            self._changed.notify_all()
        return future

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
                for future, _ in self._tasks:
                    future.cancel()
            self._changed.notify_all()
        self._thread.join()

    def _check_open(self) -> None:
        if self._closing:
            raise Closed("the engine is closing and takes no more requests")

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._tasks or not self.scheduler.idle)
                if self.scheduler.idle and not self._tasks:
                    return
                tasks, self._tasks = self._tasks, []
            for future, function in tasks:
                _call(future, function)
            try:
                self.scheduler.step()
            except Exception as error:  # of no job in particular: none of them can be trusted to end
                self.scheduler.fail(error)


def _call(future: Future[T], function: Callable[[], T]) -> None:
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)
