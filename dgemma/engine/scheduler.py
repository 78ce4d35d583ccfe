"""Many requests at once, a step at a time: rows join, are prefilled in chunks, denoise, commit and leave.

The scheduler knows no threads and no clocks but its own steps; `engine.py` runs it. Each step encodes (chunks of
prompts and settled canvases, in one causal pass) and then denoises every row that has a canvas, in one bidirectional
pass. A row's noise, options and stop are its own, so what it says does not depend on who else is there.
"""

import itertools
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from time import perf_counter
from typing import TypeVar

import torch
from torch import Tensor

from dgemma.decoding.blocks import Request, begin, check_room
from dgemma.decoding.denoise import Canvas, denoise_step
from dgemma.decoding.events import Event, Prefilled
from dgemma.engine.prefix import Pages, PrefixCache
from dgemma.model.cache import Cache, Row
from dgemma.model.network import DiffusionGemma
from dgemma.picture import Placed, uncut, within

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """What the engine may hold. rows: requests in work; waiting: requests in the queue; cache_bytes: pages of rows in
    work; prefix_bytes: pages kept for later requests; prefill_tokens: prompt tokens encoded in one step.
    """

    rows: int = 8
    waiting: int = 64
    cache_bytes: int = 4 << 30
    prefix_bytes: int = 1 << 30
    prefill_tokens: int = 1024


class QueueFull(RuntimeError):  # noqa: N818
    """There is no room for another request now; later there may be."""


@dataclass(eq=False)
class Job:
    """A request in the scheduler: `take` gets its events; `ended`, once, the error that ended it, or None."""

    request: Request
    take: Callable[[Event], None]
    ended: Callable[[Exception | None], None]
    pages: Pages
    number: int
    nbytes: int
    row: Row = field(default_factory=Row)
    cached: int = 0
    canvas: Canvas | None = None
    pending: Tensor | None = None
    """A settled canvas that is to be encoded before the next one begins."""
    cancelled: bool = False
    error: Exception | None = None
    done: bool = False

    @property
    def prompt_left(self) -> int:
        return len(self.request.prompt) - self.row.length if not self.request.steps and self.pending is None else 0


class Scheduler:
    """Runs jobs. Any thread may `submit` and `cancel`; one calls `step`, which does one round of work for all."""

    def __init__(self, model: DiffusionGemma, limits: Limits):
        self.model, self.limits = model, limits
        self._lock = threading.Lock()
        self.prefixes = PrefixCache(model.config, limits.prefix_bytes)
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self._numbers = itertools.count()
        self._caches: dict[tuple[int, ...], Cache] = {}

    @property
    def nbytes(self) -> int:
        """Bytes that the jobs in work may come to hold."""
        return sum(job.nbytes for job in self.running)

    @property
    def queued(self) -> int:
        """Requests that wait for a row; cancelled ones have given up their places."""
        return sum(not job.cancelled for job in self.waiting)

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.running)

    def submit(
        self, request: Request, take: Callable[[Event], None], ended: Callable[[Exception | None], None], salt: str = ""
    ) -> Job:
        """Queues a request. ValueError if it could never fit; QueueFull if it does not fit now."""
        if not len(request.prompt):
            raise ValueError("the prompt is empty; give at least one token")
        positions = check_room(self.model, request, 0)
        nbytes = self.model.cache_bytes(positions)
        if nbytes > self.limits.cache_bytes:
            raise ValueError(
                f"prompt and answer need {nbytes >> 20} MiB of cache; the engine has "
                f"{self.limits.cache_bytes >> 20}: shorten the prompt or lower max_new_tokens"
            )
        pages = Pages(self.model.config.canvas_length, salt, request.pictures)
        pages.extend(request.prompt)
        with self._lock:
            if self.queued >= self.limits.waiting:
                raise QueueFull(f"{self.queued} requests are waiting, which is the limit; try again later")
            job = Job(request, take, ended, pages, next(self._numbers), nbytes)
            self.waiting.append(job)
        return job

    def cancel(self, job: Job) -> None:
        """Lets a job go; its row is free after the next step."""
        job.cancelled = True

    def jobs(self) -> list[Job]:
        """All that are in work or waiting."""
        with self._lock:
            return [*self.running, *self.waiting]

    def fail(self, error: Exception) -> None:
        """Ends every job with an error."""
        for job in self.jobs():
            job.error = error
        self._leave()

    @torch.inference_mode()
    def step(self) -> None:
        """One round: admit, encode, denoise, settle. Errors of a job end that job alone."""
        self._leave()
        self._admit()
        self._encode()
        self._denoise()
        self._leave()

    def _leave(self) -> None:
        """Frees what is done, cancelled or in error, and says so."""
        with self._lock:
            gone = [job for job in (*self.running, *self.waiting) if job.done or job.cancelled or job.error]
            self.running = [job for job in self.running if job not in gone]
            self.waiting = deque(job for job in self.waiting if job not in gone)
        if gone:
            self._caches.clear()
        for job in gone:
            job.done = True
            with suppress(Exception):  # whoever listens may be gone too
                job.ended(job.error)

    def _admit(self) -> None:
        """Takes waiting jobs in, in their order, while rows and memory last."""
        while self.waiting and len(self.running) < self.limits.rows:
            if self.nbytes + self.waiting[0].nbytes > self.limits.cache_bytes:
                break
            with self._lock:
                job = self.waiting.popleft()
                self.running.append(job)

    def _encode(self) -> None:
        """Settled canvases, and as much of the prompts as a step may take, in one causal pass."""
        filling = self._filling()
        parts: list[tuple[Job, Tensor, Sequence[Placed]]]
        parts = [(job, job.pending, ()) for job in self.running if job.pending is not None]
        # All get a share, so that a short prompt need not wait for a long one.
        share = self.limits.prefill_tokens // max(1, len(filling))
        for job in filling:
            begin, pictures = job.row.length, job.request.pictures
            end = uncut(begin, begin + min(job.prompt_left, self._chunk(job, share)), pictures)
            parts.append((job, job.request.prompt[begin:end], within(pictures, begin, end)))
        if not parts:
            return
        started = perf_counter()

        def encode(some: Sequence[tuple[Job, Tensor, Sequence[Placed]]]) -> None:
            jobs, tokens, pictures = zip(*some, strict=True)
            self.model.encode(tokens, self._cache(jobs), pictures=pictures)

        self._isolated(encode, parts, [job for job, *_ in parts])
        seconds = (perf_counter() - started) / len(parts)
        for job, *_ in parts:
            if job.error is None:
                self._encoded(job, seconds)

    def _filling(self) -> list[Job]:
        """Jobs whose prompts are encoded in this step. Those that go on alike wait for the first one's pages."""
        found, begun = [], set()
        for job in self.running:
            if not job.prompt_left:
                continue
            if job.row.length == job.cached:  # nothing of its own yet
                job.row = self.prefixes.find(job.pages)
                job.cached = job.row.length
            page = job.row.length // job.pages.size
            key = job.pages.keys[page] if page < len(job.pages.keys) else None
            if key is None or key not in begun or not self.limits.prefix_bytes:
                found.append(job)
            begun.add(key)
        return found

    def _chunk(self, job: Job, room: int) -> int:
        """Tokens of a prompt for one step: to a page's end, at least one page, and none dropped before it is kept."""
        page, window = self.model.config.canvas_length, self.model.config.prefix_window
        most = max(1, min(room, window) // page) * page
        return most - job.row.length % page

    def _encoded(self, job: Job, seconds: float) -> None:
        request = job.request
        if job.pending is not None:
            job.pages.extend(job.pending)
        self.prefixes.add(job.pages, job.row)
        if job.pending is not None:
            request.commit_seconds += seconds
            job.pending = None
            job.canvas = begin(self.model, job.number, request)
            return
        request.prefill_seconds += seconds
        if not job.prompt_left:
            request.prompt_tokens = len(request.prompt)
            encoded = len(request.prompt) - job.cached
            self._tell(job, Prefilled(job.number, encoded, job.cached, request.prefill_seconds))
            job.canvas = begin(self.model, job.number, request)

    def _denoise(self) -> None:
        jobs = [job for job in self.running if job.canvas is not None and job.error is None]
        going = [job for job in jobs if job.canvas and not job.canvas.done]

        def denoise(some: Sequence[Job]) -> None:
            events = denoise_step(self.model, self._cache(some), [job.canvas for job in some if job.canvas])
            for job, event in zip(some, events, strict=True):
                self._tell(job, event)

        if going:
            self._isolated(denoise, going, going)
        for job in jobs:
            if job.error is None and job.canvas is not None and job.canvas.done:
                self._settle(job, job.canvas)

    def _settle(self, job: Job, canvas: Canvas) -> None:
        self._tell(job, job.request.settle(canvas))
        job.canvas = None
        if job.request.reason:
            self._tell(job, job.request.finished(job.number))
            job.done = True
        else:
            job.pending = canvas.best

    def _tell(self, job: Job, event: Event) -> None:
        try:
            job.take(event)
        except Exception as error:
            job.error = error

    def _isolated(self, work: Callable[[Sequence[T]], object], parts: Sequence[T], jobs: Sequence[Job]) -> None:
        """Does the work for all parts at once. If that fails, for each alone, so that only the culprit ends."""
        try:
            work(parts)
        except Exception:
            for part, job in zip(parts, jobs, strict=True):
                try:
                    work([part])
                except Exception as error:
                    job.error = error

    def _cache(self, jobs: Sequence[Job]) -> Cache:
        """The rows of some jobs as a cache; the same one as long as they are the same, for what it has gathered."""
        key = tuple(job.number for job in jobs)
        if key not in self._caches:
            cache = self.model.new_cache(0)
            cache.rows = [job.row for job in jobs]
            self._caches = {key: cache}
        return self._caches[key]
