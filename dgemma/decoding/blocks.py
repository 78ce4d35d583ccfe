"""Text, block after block: encode the prompt, denoise a canvas until it is still, commit it, begin the next."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor

from dgemma.config import GenerationConfig
from dgemma.decoding.denoise import Canvas, denoise_step
from dgemma.decoding.events import Block, Event, Finished, Prefilled
from dgemma.decoding.noise import Noise
from dgemma.decoding.pins import UNKNOWN, Known
from dgemma.model.cache import Cache
from dgemma.model.network import DiffusionGemma
from dgemma.picture import Placed


@dataclass
class Request:
    """One row: what to continue, how, and what has come of it so far.

    pictures: those that stand for tokens of the prompt, in order.
    """

    prompt: Tensor
    options: GenerationConfig
    noise: Noise
    known: Known = UNKNOWN
    pictures: tuple[Placed, ...] = ()
    tokens: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    converged: list[bool] = field(default_factory=list)
    reason: str = ""
    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    denoise_seconds: float = 0.0
    commit_seconds: float = 0.0

    def settle(self, canvas: Canvas) -> Block:
        """Takes a settled canvas into the text, up to an end token or the limit; none before the last pin ends it."""
        ends = torch.isin(canvas.best, torch.tensor(self.options.eos_token_id))
        ends[: canvas.endless] = False
        first = ends.nonzero()
        kept = canvas.best.tolist()[: int(first[0]) + 1 if len(first) else None]
        room = self.known.length(self.options) - len(self.tokens)
        if len(first) and len(kept) <= room:
            self.reason = "stop"
        elif len(kept) >= room:
            # What keeps to an automaton is whole at its limit, with an end token or without.
            self.reason = "stop" if self.known.constraint else "length"
        self.tokens += kept[:room]
        self.steps.append(canvas.steps)
        self.converged.append(canvas.still)
        self.denoise_seconds += canvas.seconds
        return Block(canvas.row, canvas.block, kept[:room], canvas.steps, canvas.still, canvas.seconds)

    def finished(self, row: int) -> Finished:
        seconds = (self.prefill_seconds, self.denoise_seconds, self.commit_seconds)
        return Finished(row, self.tokens, self.reason, self.steps, self.converged, self.prompt_tokens, *seconds)


@torch.inference_mode()
def generate(model: DiffusionGemma, requests: Sequence[Request], cache: Cache | None = None) -> Iterator[Event]:
    """Runs a batch of requests, each at its own pace: a row that settles commits and goes on while others denoise.

    cache: encoded prefixes that the prompts continue, a row each; it is left as it was.
    """
    cache = prefixes(model, requests, cache)
    for row, request in enumerate(requests):
        cached = request.prompt_tokens - len(request.prompt)
        yield Prefilled(row, len(request.prompt), cached, request.prefill_seconds)

    canvases = [begin(model, row, request) for row, request in enumerate(requests)]
    while canvases:
        if going := [c for c in canvases if not c.done]:
            yield from denoise_step(model, cache.select([c.row for c in going]), going)
        settled = [c for c in canvases if c.done]
        for canvas in settled:
            request = requests[canvas.row]
            yield request.settle(canvas)
            if request.reason:
                yield request.finished(canvas.row)
        going_on = [c for c in settled if not requests[c.row].reason]
        commit(model, cache, going_on, requests)
        canvases = [
            begin(model, c.row, requests[c.row]) if c.done else c for c in canvases if not requests[c.row].reason
        ]


def prefixes(model: DiffusionGemma, requests: Sequence[Request], cache: Cache | None) -> Cache:
    """A cache of its own for the batch, with every prompt encoded."""
    started = perf_counter()
    if cache is not None and len(cache.rows) != len(requests):
        raise ValueError(f"the cache has {len(cache.rows)} rows for {len(requests)} requests")
    cache = cache.fork() if cache is not None else model.new_cache(len(requests))
    for row, request in enumerate(requests):
        if not cache.lengths[row] + len(request.prompt):
            raise ValueError(f"the prompt of row {row} is empty; give at least one token")
        check_room(model, request, cache.lengths[row])
    model.encode([r.prompt for r in requests], cache, pictures=[r.pictures for r in requests])
    for row, request in enumerate(requests):
        request.prompt_tokens = cache.lengths[row]
        request.prefill_seconds = (perf_counter() - started) / len(requests)
    return cache


def check_room(model: DiffusionGemma, request: Request, cached: int) -> int:
    """Positions that prompt and answer need behind what is cached, in whole canvases. ValueError if they do not fit,
    or if what is known of the answer allows none.
    """
    request.known.check(request.options, model.config)
    canvas, have = model.config.canvas_length, model.config.max_position_embeddings
    own = len(request.prompt) + math.ceil(request.known.length(request.options) / canvas) * canvas
    wanted = cached + own
    if wanted > have:
        raise ValueError(
            f"prompt and answer need {wanted} positions; the model has {have}: "
            "shorten the prompt or lower max_new_tokens"
        )
    return own


def commit(model: DiffusionGemma, cache: Cache, canvases: Sequence[Canvas], requests: Sequence[Request]) -> None:
    """Encodes the settled canvases, whole, behind their prefixes: the clean arg-max, never the noisy canvas."""
    if not canvases:
        return
    started = perf_counter()
    model.encode([c.best for c in canvases], cache.select([c.row for c in canvases]))
    for canvas in canvases:
        requests[canvas.row].commit_seconds += (perf_counter() - started) / len(canvases)


def begin(model: DiffusionGemma, row: int, request: Request) -> Canvas:
    """The request's next canvas."""
    r = request
    return Canvas.begin(model, row, len(r.steps), r.options, r.noise, r.known, r.tokens)
