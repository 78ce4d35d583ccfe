"""`dgemma bench serve`: a server under load, beside its own engine without HTTP and transformers one at a time.

Clients ask, wait for the answer and ask again. Every answer is BLOCKS canvases of STEPS steps: no end token can be
written and no canvas can stop early, so all sides do the same work, which each of them counts.
"""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, NamedTuple

from dgemma.bench.decode import DTYPES, OURS, THEIRS, check
from dgemma.bench.harness import Side, Spread, cores, have_transformers, machine, versions
from dgemma.bench.shapes import SHAPES
from dgemma.bench.sides import Common, Transformers

CONCURRENCY = (1, 4, 16, 64)
BLOCKS, STEPS = 2, 4
SHARED = 4096
"""Tokens of the prefix that several prompts share."""
NEVER = 1 << 30
"""An end token that no model has."""


class Sample(NamedTuple):
    """One answer of a client. Times in seconds: when it was asked for, its first block came, it was complete."""

    client: int
    began: float
    first: float
    ended: float


@dataclass(frozen=True)
class Level:
    """What so many clients at once saw; medians of the repeats, and the least and most.

    first_block: median time to the first text, in seconds; p50, p99: of whole answers, in seconds; fairness: Jain's
    index of the clients' tokens a second, 1 where all are equal. Tokens are positions of canvases.
    """

    first_block: Spread
    tokens_per_second: Spread
    p50: Spread
    p99: Spread
    fairness: Spread


@dataclass(frozen=True)
class Shared:
    """Time to the first block, in seconds, behind a long prefix: never seen before, and seen with another ending.

    cached: tokens that were not encoded again; gain: cold over warm, pair by pair.
    """

    tokens: int
    cached: int
    cold: Spread
    warm: Spread
    gain: Spread


@dataclass(frozen=True)
class Result:
    """A run; `served`, `engine`, `overhead` and `gain` are by the number of clients.

    overhead: time of the served answers over that of the engine's alone, less one; gain: served tokens a second over
    those of transformers, whose answers come one at a time, at their end. None where there is nothing to compare.
    """

    model: str
    dtype: str
    device: str
    threads: int
    repeats: int
    requests: int
    prompt: int
    canvas: int
    blocks: int
    steps: int
    machine: str
    versions: dict[str, str]
    served: dict[int, Level]
    engine: dict[int, Level]
    transformers: Level | None
    overhead: dict[int, Spread]
    gain: dict[int, Spread] | None
    shared_prefix: Shared | None
    peak_bytes: dict[str, int | None]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def run(
    shape: str | None = None,
    model: str | None = None,
    dtype: str | None = None,
    requests: int = 2,
    concurrency: Sequence[int] = CONCURRENCY,
    repeats: int = 5,
    threads: int | None = None,
    device: str = "cpu",
    progress: Callable[[str], None] = lambda line: None,
) -> Result:
    """Measures serving. shape: random weights ("train" if neither is told); model: a name, a directory or a hub id.

    requests: answers that each client asks for. Without transformers it is left out. Raises ValueError for a value
    that is not known, OSError if a side's process ends.
    """
    if model and (shape or dtype):
        raise ValueError("shape and dtype are for random weights: give them or model")
    shape, dtype = shape or "train", dtype or "f32"
    check(shape, dtype, repeats, threads)
    levels = list(dict.fromkeys(concurrency))
    for name, values in (("requests", [requests]), ("concurrency", levels or [0])):
        if min(values) < 1:
            raise ValueError(f"{name} must be at least 1, not {min(values)}")
    from dgemma.checkpoints.load import resolve_device

    device, threads = str(resolve_device(device)), threads or cores()
    theirs = have_transformers(progress)
    with TemporaryDirectory(prefix="dgemma-bench-") as folder, ExitStack() as stack:
        progress(f"writing weights: {model or f'random, {shape}, {dtype}'}")
        work = _write(model, shape, dtype, Path(folder))
        options = {"directory": folder, "device": device, "threads": threads}
        sides = {OURS: stack.enter_context(Side(OURS, f"{__name__}:Served", {**options, "rows": max(levels)}))}
        if theirs:
            other = {**options, "tokens": work.prompt}
            sides[THEIRS] = stack.enter_context(Side(THEIRS, f"{__name__}:OneByOne", other))
        loads = _measure(sides, work, levels, requests, repeats, progress)
        shared = _shared(Web(sides[OURS].ask("url")), work, repeats, progress) if work.room >= SHARED else None
        peaks = {name: side.ask("peak") for name, side in sides.items()}
    seconds = {name: [_span(samples) for samples in repeated] for name, repeated in loads.items()}
    overhead = {
        n: Spread.of([s / e - 1 for s, e in zip(seconds["served", n], seconds["engine", n], strict=True)])
        for n in levels
    }
    gain = None
    if theirs:
        # In the same time, n clients were given n times the answers of one.
        one = seconds[THEIRS, 1]
        gain = {n: Spread.of([n * t / s for t, s in zip(one, seconds["served", n], strict=True)]) for n in levels}
    tokens = work.canvas * BLOCKS
    told = {key: _level(repeated, tokens) for key, repeated in loads.items()}
    return Result(
        model=model or shape,
        dtype=work.dtype,
        device=device,
        threads=threads,
        repeats=repeats,
        requests=requests,
        prompt=work.prompt,
        canvas=work.canvas,
        blocks=BLOCKS,
        steps=STEPS,
        machine=machine(),
        versions=versions(theirs),
        served={n: told["served", n] for n in levels},
        engine={n: told["engine", n] for n in levels},
        transformers=told.get((THEIRS, 1)),
        overhead=overhead,
        gain=gain,
        shared_prefix=shared,
        peak_bytes=peaks,
    )


class Work(NamedTuple):
    """What is asked for. prompt: tokens; room: tokens that a prompt may have before it; vocabulary: size."""

    prompt: int
    canvas: int
    room: int
    vocabulary: int
    dtype: str


def _write(model: str | None, shape: str, dtype: str, directory: Path) -> Work:
    """A model directory that all sides load, whose defaults are the work of an answer."""
    import torch

    from dgemma.checkpoints.save import save_model
    from dgemma.config import GenerationConfig
    from dgemma.model.network import DiffusionGemma

    if model:
        from dgemma.language_model import load

        lm = load(model, "cpu")
        network, tokenizer = lm.model, lm.tokenizer.backend
        prompt = min(256, network.config.canvas_length)
        if network.config.vision is None:  # which transformers does not build
            tower, size = SHAPES[shape].config.vision, network.config.vocab_size
            config = replace(network.config, vision=tower, image_token_id=size)
            whole = DiffusionGemma(config).init_weights(seed=0).to(network.dtype)
            whole.load_state_dict(network.state_dict(), strict=False)
            network = whole
    else:
        network = DiffusionGemma(SHAPES[shape].config).init_weights(seed=0).to(getattr(torch, DTYPES[dtype]))
        tokenizer, prompt = numbers(network.config.vocab_size), SHAPES[shape].prompt
    canvas = network.config.canvas_length
    defaults = GenerationConfig(
        max_new_tokens=BLOCKS * canvas,
        max_denoising_steps=STEPS,
        stability_threshold=STEPS,
        confidence_threshold=1e-30,  # transformers asks for more than 0
        eos_token_id=(NEVER,),
    )
    save_model(network, directory, defaults)
    tokenizer.save(str(directory / "tokenizer.json"))
    room = network.config.max_position_embeddings - BLOCKS * canvas - prompt
    if room < 0:
        raise ValueError(f"{model or shape} has {network.config.max_position_embeddings} positions: too few")
    return Work(prompt, canvas, room, network.config.vocab_size, str(network.dtype).removeprefix("torch."))


def numbers(size: int) -> Any:
    """A tokenizer of `size` tokens that reads and writes a word for each: <0>, <1>, …"""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    return Tokenizer(WordLevel({f"<{i}>": i for i in range(size)}, unk_token="<0>"))


def prompt_of(number: int, vocabulary: int, tokens: int) -> list[int]:
    """Random tokens, for each number others."""
    from dgemma.decoding.noise import Noise

    return Noise(number, vocabulary, tokens).canvas(0).tolist()


def ask_all(clients: int, requests: int, first: int, ask: Callable[[int], float]) -> list[Sample]:
    """The answers to so many clients that begin at once; prompts are numbered from `first`.

    ask: gets the answer to a prompt's number and returns when its first block came.
    """
    together = threading.Barrier(clients)

    def client(number: int) -> list[Sample]:
        samples = []
        together.wait()
        for turn in range(requests):
            began = perf_counter()
            came = ask(first + number * requests + turn)
            samples.append(Sample(number, began, came, perf_counter()))
        return samples

    with ThreadPoolExecutor(clients) as pool:
        return [sample for samples in pool.map(client, range(clients)) for sample in samples]


class Web:
    """Asks a server for completions, as a stream."""

    def __init__(self, url: str):
        from dgemma.terminal.remote import Server

        self.server = Server.at(url)

    def ask(self, prompt: list[int], seed: int) -> tuple[float, dict[str, Any]]:
        """When the first block came, and the usage. Raises OSError if the work was not what was asked for."""
        first = 0.0
        usage: dict[str, Any] = {}
        body = {"prompt": prompt, "seed": seed, "stream_options": {"include_usage": True}}
        for chunk in self.server.stream("/completions", body):
            first = first or perf_counter()
            usage = chunk.get("usage") or usage
        _check(usage["diffusion"]["denoising_steps"])
        return first, usage


class Served(Common):
    """This project: a server, and the engine that it has."""

    def __init__(self, directory: str, device: str, threads: int, rows: int):
        super().__init__(device, threads)
        from dgemma.engine.scheduler import Limits
        from dgemma.language_model import load
        from dgemma.serve.app import make_app
        from dgemma.serve.server import Server, bind
        from dgemma.serve.service import Service

        self.lm = load(directory, device)
        self.service = Service("bench", Limits(rows=rows, waiting=rows), time_limit=3600.0)
        self.service.open(self.lm)
        self.listening = bind("127.0.0.1", 0)
        server = Server(make_app(self.service, quiet=True), self.service)
        threading.Thread(target=server.run, kwargs={"sockets": [self.listening]}, daemon=True).start()

    def url(self) -> str:
        from dgemma.serve.server import url

        return url(self.listening)

    def load(self, clients: int, requests: int, first: int, tokens: int) -> list[Sample]:
        """The same load on the engine alone."""
        return ask_all(clients, requests, first, lambda number: self._ask(number, tokens))

    def _ask(self, number: int, tokens: int) -> float:
        import torch

        from dgemma.decoding.blocks import Request
        from dgemma.decoding.events import Block, Finished

        prompt = torch.tensor(prompt_of(number, self.lm.model.config.vocab_size, tokens))
        first = 0.0
        for event in self.service.engine.stream(Request(prompt, self.lm.defaults, self.lm.noise(number))):
            if isinstance(event, Block):
                first = first or perf_counter()
            elif isinstance(event, Finished):
                _check(sum(event.steps))
        return first


class OneByOne(Transformers):
    """transformers as it comes: an answer at a time, which is there when it is complete."""

    def load(self, requests: int, first: int) -> list[Sample]:
        """One client's answers."""
        return ask_all(1, requests, first, self._ask)

    def _ask(self, number: int) -> float:
        from unittest import mock

        import torch

        prompt = torch.tensor([prompt_of(number, self.vocab_size, self.tokens)], device=self.device)
        step, steps = self.model._denoising_step, count()

        def counted(**arguments: Any) -> Any:
            next(steps)
            return step(**arguments)

        with mock.patch.object(self.model, "_denoising_step", counted):
            self.model.generate(prompt, max_new_tokens=BLOCKS * self.model.config.canvas_length)
        self._wait()
        _check(next(steps))
        return perf_counter()


def _check(steps: int) -> None:
    if steps != BLOCKS * STEPS:
        raise OSError(f"an answer took {steps} denoising steps instead of {BLOCKS * STEPS}: no fair comparison")


Loads = dict[tuple[str, int], list[list[Sample]]]
"""Samples of each repeat, by who answered and how many clients asked."""


def _measure(
    sides: dict[str, Side],
    work: Work,
    levels: Sequence[int],
    requests: int,
    repeats: int,
    progress: Callable[[str], None],
) -> Loads:
    """All take turns in everything, so that whatever else the machine does falls on all of them."""
    web, taken = Web(sides[OURS].ask("url")), 1
    loads: Loads = {}

    def ask(number: int) -> float:
        return web.ask(prompt_of(number, work.vocabulary, work.prompt), number)[0]

    def turn(name: str, clients: int) -> list[Sample]:
        nonlocal taken
        first, taken = taken, taken + clients * requests  # prompts that nobody has seen
        if name == "served":
            return ask_all(clients, requests, first, ask)
        if name == "engine":
            told = sides[OURS].ask("load", clients=clients, requests=requests, first=first, tokens=work.prompt)
        else:
            told = sides[THEIRS].ask("load", requests=requests, first=first)
        return [Sample(*sample) for sample in told]

    turns = [(THEIRS, 1)] * (THEIRS in sides) + [(name, n) for n in levels for name in ("served", "engine")]
    progress("warming up")
    for name, clients in turns:
        turn(name, clients)
    for repeat in range(repeats):
        for name, clients in turns:
            progress(f"{name}, {clients} clients, {repeat + 1} of {repeats}")
            loads.setdefault((name, clients), []).append(turn(name, clients))
    return loads


def _shared(web: Web, work: Work, repeats: int, progress: Callable[[str], None]) -> Shared:
    """A long prefix that is new, then the same one with another ending."""
    cold, warm, cached = [], [], 0
    for repeat in range(repeats + 1):
        progress(f"a shared prefix of {SHARED} tokens, {repeat} of {repeats}")
        prefix = prompt_of(1 << 32 | repeat, work.vocabulary, SHARED)
        seconds = []
        for ending in (1 << 33, 1 << 34):
            prompt = prefix + prompt_of(ending | repeat, work.vocabulary, work.prompt)
            began = perf_counter()
            first, usage = web.ask(prompt, repeat)
            seconds.append(first - began)
            cached = usage["prompt_tokens_details"]["cached_tokens"]
        if repeat:  # the first one warms up
            cold.append(seconds[0])
            warm.append(seconds[1])
    gains = [c / w for c, w in zip(cold, warm, strict=True)]
    return Shared(SHARED, cached, Spread.of(cold), Spread.of(warm), Spread.of(gains))


def _span(samples: Sequence[Sample]) -> float:
    """Seconds from the first question to the last answer."""
    return max(sample.ended for sample in samples) - min(sample.began for sample in samples)


def _level(repeated: Sequence[Sequence[Sample]], tokens: int) -> Level:
    """tokens: of one answer."""
    latencies = [sorted(sample.ended - sample.began for sample in samples) for samples in repeated]
    return Level(
        first_block=Spread.of([median(s.first - s.began for s in samples) for samples in repeated]),
        tokens_per_second=Spread.of([tokens * len(samples) / _span(samples) for samples in repeated]),
        p50=Spread.of([percentile(ordered, 50) for ordered in latencies]),
        p99=Spread.of([percentile(ordered, 99) for ordered in latencies]),
        fairness=Spread.of([jain(list(_rates(samples))) for samples in repeated]),
    )


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The least of the values that so many of them do not exceed."""
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def jain(values: Sequence[float]) -> float:
    """Jain's index of fairness: 1 if all are equal, 1/n if one has everything."""
    return sum(values) ** 2 / (len(values) * sum(value**2 for value in values))


def _rates(samples: Sequence[Sample]) -> Iterator[float]:
    """Answers a second of each client, over the time that its own answers took."""
    for client in {sample.client for sample in samples}:
        own = [sample for sample in samples if sample.client == client]
        yield len(own) / _span(own)
