"""The choices of one HTTP request on their way through the engine."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from fastapi import Request as HttpRequest

from dgemma.config import GenerationConfig
from dgemma.decoding import autoregressive
from dgemma.decoding.blocks import Request
from dgemma.decoding.events import Block, Event, Finished, Prefilled
from dgemma.engine.engine import Ended, Engine, Take
from dgemma.picture import Prompted
from dgemma.serve.errors import ApiError, ClientGone, closing, invalid, of_engine
from dgemma.serve.feed import Feed
from dgemma.serve.known import known_of
from dgemma.serve.schema import Generate
from dgemma.serve.service import Service
from dgemma.serve.text import ChoiceText
from dgemma.text.output import Increment

KEEP_ALIVE = 10.0
T = TypeVar("T")


@dataclass
class Choice:
    """One answer in the making. `reason` is empty until it is complete; `named`: its client chose the tool it calls;
    `span`: from where to where a block is text, if the rest was given.
    """

    index: int
    request: Request
    text: ChoiceText
    named: bool = False
    span: tuple[int, int | None] = (0, None)
    prefilled: Prefilled | None = None
    blocks: list[Block] = field(default_factory=list)
    reason: str = ""

    @property
    def finish_reason(self) -> str:
        return "tool_calls" if self.text.tool_calls and not self.named else self.reason


@dataclass(frozen=True)
class Progress:
    """An event of a choice and what its text gains by it."""

    choice: Choice
    event: Event
    increments: list[Increment]


class Answers:
    """Submits choices together; iterate over `progress` to bring them to their end.

    steps: report denoising steps too. given: tokens that the client gave, where they are not the choices' prompts.
    All is cancelled when the iteration ends, however it ends, or the client leaves.
    """

    def __init__(
        self,
        service: Service,
        http: HttpRequest,
        body: Generate,
        choices: Sequence[Choice],
        steps: bool,
        given: int | None = None,
    ):
        self.service, self.http, self.choices, self.seed = service, http, choices, choices[0].request.noise.seed
        self._given = given
        self._feed, self._started = Feed(steps), time.monotonic()
        self._cancel: list[Callable[[], object]] = []
        try:
            if body.autoregressive:
                self._race(choices[0], body.temperature or 0.0)
            else:
                puts = [partial(self._feed.put, number) for number in range(len(choices))]
                requests: list[tuple[Request, Take, Ended]]
                requests = [(c.request, put, put) for c, put in zip(choices, puts, strict=True)]
                if service.recorder:
                    requests = [service.recorder.watched(*request) for request in requests]
                jobs = service.engine.submit_all(requests)
                self._cancel = [partial(service.engine.cancel, job) for job in jobs]
        except ValueError as error:
            raise invalid(error, "max_tokens" if "prompt is empty" not in str(error) else "prompt") from None
        except RuntimeError as error:
            raise of_engine(error) from None
        self._watch = asyncio.create_task(self._until_gone())

    async def progress(self) -> AsyncIterator[Progress | None]:
        """What happens, as it happens; None where nothing has happened for a while."""
        left, deadline = len(self.choices), self._started + self.service.time_limit
        try:
            while left:
                wait = deadline - time.monotonic()
                try:
                    number, item = await self._feed.get(min(KEEP_ALIVE, wait))
                except TimeoutError:
                    if wait <= KEEP_ALIVE:
                        told = f"the request took longer than the server's limit of {self.service.time_limit:g} s"
                        raise ApiError(504, told, code="timeout") from None
                    yield None
                    continue
                if isinstance(item, ClientGone):
                    raise item
                choice = self.choices[number]
                if choice.reason:
                    continue
                if item is None:  # cancelled, but not by us
                    raise closing()
                if isinstance(item, Exception):
                    raise of_engine(item)
                yield Progress(choice, item, self._take(choice, item))
                if choice.reason:
                    left -= 1
                    self._cancel[number]()
        finally:
            self._end()

    async def complete(self) -> None:
        """Waits for all choices."""
        async for _ in self.progress():
            pass

    def usage(self) -> dict[str, Any]:
        """Figures of all choices together; a prompt that several share counts once."""
        firsts = {tuple(c.request.prompt.tolist()): c for c in reversed(self.choices)}.values()
        cached = [c.prefilled.cached for c in firsts if c.prefilled]
        if self._given is None:
            prompt, read = sum(len(c.request.prompt) for c in firsts), sum(cached)
        else:  # the choices' prompts are beginnings of one text
            prompt, read = self._given, max(cached, default=0)
        completion = sum(len(c.text.tokens) for c in self.choices)
        blocks = [block for c in self.choices for block in c.blocks]
        steps = sum(block.steps for block in blocks)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": read},
            "completion_tokens_details": {"reasoning_tokens": sum(c.text.reasoning_tokens for c in self.choices)},
            "diffusion": {
                "denoising_steps": steps,
                "tokens_per_forward": round(completion / max(1, steps), 3),
                "blocks": len(blocks),
                "converged": all(block.converged for block in blocks),
                "prefill_seconds": round(sum(c.prefilled.seconds for c in self.choices if c.prefilled), 6),
                "denoise_seconds": round(sum(block.denoise_seconds for block in blocks), 6),
                "commit_seconds": round(sum(c.request.commit_seconds for c in self.choices), 6),
                "seed": self.seed,
            },
        }

    def _take(self, choice: Choice, event: Event) -> list[Increment]:
        """What a choice's text gains by an event."""
        metrics, increments = self.service.metrics, []
        if isinstance(event, Prefilled):
            choice.prefilled = event
            metrics.prefix_hits.inc(event.cached > 0)
        elif isinstance(event, Block):
            if not any(c.blocks for c in self.choices):
                metrics.first_block.observe(time.monotonic() - self._started)
            choice.blocks.append(event)
            increments = choice.text.push(event.tokens[slice(*choice.span)])
        elif isinstance(event, Finished):
            increments = choice.text.finish()
            choice.reason = event.reason
        if choice.text.stopped:
            choice.reason = "stop"
        return increments

    def _end(self) -> None:
        self._watch.cancel()
        for cancel in self._cancel:
            cancel()
        usage, metrics = self.usage(), self.service.metrics
        metrics.tokens.labels("prompt").inc(usage["prompt_tokens"])
        metrics.tokens.labels("cached").inc(usage["prompt_tokens_details"]["cached_tokens"])
        metrics.tokens.labels("generated").inc(usage["completion_tokens"])
        metrics.steps.inc(usage["diffusion"]["denoising_steps"])
        self.http.state.tokens = usage["completion_tokens"]

    async def _until_gone(self) -> None:
        while (await self.http.receive())["type"] != "http.disconnect":
            pass
        for cancel in self._cancel:
            cancel()
        self._feed.put(0, ClientGone())

    def _race(self, choice: Choice, temperature: float) -> None:
        """The autoregressive mode: a token between two steps of the engine, so that nobody is held up."""
        lm, request = self.service.lm, choice.request
        size = len(request.prompt) + request.options.max_new_tokens
        if lm.model.cache_bytes(size) > self.service.limits.cache_bytes:
            raise ValueError(f"prompt and answer of {size} tokens do not fit the engine's cache: lower max_tokens")

        async def pump() -> None:
            try:
                async with self.service.aside:
                    events = autoregressive.generate(lm.model, request, temperature=temperature)
                    if self.service.recorder:
                        events = self.service.recorder.autoregressive(request, events, temperature)
                    async for event in on_engine(self.service.engine, events):
                        self._feed.put(0, event)
            except ValueError as error:
                self._feed.put(0, invalid(error, "max_tokens"))
            except Exception as error:
                self._feed.put(0, error)

        self._cancel = [asyncio.create_task(pump()).cancel]


def settled(service: Service, body: Generate) -> tuple[int, GenerationConfig]:
    """The first choice's seed, and how to decode."""
    seed = secrets.randbits(53) if body.seed is None else body.seed  # 53: a number that JavaScript can hold
    try:
        return seed, body.options(service.lm.defaults)
    except ValueError as error:
        raise invalid(error, str(error).split()[0]) from None


async def make_choices(
    service: Service, body: Generate, prompts: Sequence[Prompted], chat: bool, calls: bool, named: bool = False
) -> list[Choice]:
    """Of each prompt as many choices as the body wants made, in order."""
    lm = service.lm
    seed, options = settled(service, body)
    known = await known_of(service, body, options)
    choices: list[Choice] = []
    for prompt in prompts:
        tokens = torch.tensor(prompt.tokens, dtype=torch.int64)
        for number in range(body.candidates):
            request = Request(tokens, options, lm.noise((seed + number) % (1 << 64)), known, prompt.pictures)
            text = ChoiceText(lm.tokenizer, body.stops, options.eos_token_id, chat, calls)
            choices.append(Choice(len(choices), request, text, named))
    return choices


async def on_engine(engine: Engine, items: Iterator[T]) -> AsyncIterator[T]:
    """Advances an iterator that uses the model, an item at a time, on the engine's thread."""
    over = object()
    while (item := await asyncio.wrap_future(engine.run(partial(next, items, over)))) is not over:
        yield item
