"""Two minutes of 200 clients at once, some of which hang up: nothing is wrong, crossed, lost or left behind."""

import asyncio
import ctypes
import gc
import json
import os
import random
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from dgemma.engine.scheduler import Limits
from dgemma.language_model import LanguageModel
from tests.serve.conftest import PUZZLE, Site, serving
from tests.serve.test_http import until

CLIENTS, SECONDS = 200, 120
GROWTH = 32 << 20
"""Bytes by which a process may grow without having lost any: fragments that the allocator cannot give back."""

pytestmark = pytest.mark.slow


def puzzles(count: int) -> list[str]:
    """The same puzzle under other names of its digits."""
    rng, made = random.Random(0), []
    for _ in range(count):
        names = rng.sample("123456789", 9)
        made.append(PUZZLE.translate(str.maketrans("123456789", "".join(names))))
    return made


def resident() -> int:
    """Bytes of this process in memory, without those that are free and only kept by malloc."""
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # musl has none
        trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def handles() -> int:
    return len(os.listdir("/proc/self/fd"))


async def ask(client: httpx.AsyncClient, body: dict[str, Any], patience: int | None) -> str | None:
    """The answer of a stream; None if the client hangs up after so many lines, or the stream is shorter."""
    said, lines = "", 0
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            lines += 1
            if patience is not None and lines > patience:
                return None
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                assert "error" not in chunk, chunk
                for choice in chunk["choices"]:
                    said += choice["delta"].get("content") or ""
    return said


async def crowd(site: Site, answers: dict[tuple[str, int], str], clients: int, seconds: float) -> Counter[str]:
    """Streams until the time is over; how they went."""
    told: Counter[str] = Counter()
    end = time.monotonic() + seconds
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=site.url, timeout=300, limits=limits) as client:

        async def one(number: int) -> None:
            rng = random.Random(number)
            while time.monotonic() < end:
                puzzle, seed = rng.choice(list(answers))
                body = {"messages": [{"role": "user", "content": puzzle}], "seed": seed, "stream": True}
                body["draft"] = rng.random() < 0.3
                patience = rng.randrange(8) if rng.random() < 0.3 else None
                said = await ask(client, body, patience)
                told["dropped" if said is None else "right" if said == answers[puzzle, seed] else "wrong"] += 1

        await asyncio.gather(*(one(number) for number in range(clients)))
    return told


def counted(site: Site) -> tuple[Counter[str], dict[str, float]]:
    """Requests by status, and the gauges."""
    text = httpx.get(f"{site.url}/metrics").text
    found = re.findall(r'^dgemma_requests_total\{endpoint="/v1/chat/completions",status="(\d+)"\} (\S+)$', text, re.M)
    gauges = re.findall(r"^dgemma_(requests_running|requests_waiting|prefix_cache_bytes) (\S+)$", text, re.M)
    return Counter({status: int(float(n)) for status, n in found}), {name: float(value) for name, value in gauges}


def test_two_minutes_of_200_clients(lm: LanguageModel) -> None:
    answers = {(puzzle, seed): lm.generate(puzzle, seed=seed).text for puzzle in puzzles(4) for seed in range(3)}
    assert len(set(answers.values())) >= 4
    # A client that has hung up is noticed a moment after it has come back.
    limits = Limits(rows=32, waiting=2 * CLIENTS, prefix_bytes=1 << 20)
    with serving(lm, limits, time_limit=280, quiet=True) as site:
        scheduler = site.service.engine.scheduler

        def at_rest() -> bool:
            return scheduler.idle and not site.service.in_work.count

        warm = asyncio.run(crowd(site, answers, CLIENTS, 5))
        assert until(at_rest, 30)
        time.sleep(1)  # for connections to be closed
        memory, files = resident(), handles()

        told = asyncio.run(crowd(site, answers, CLIENTS, SECONDS))
        assert until(at_rest, 30)
        assert not told["wrong"], told
        assert told["right"] > CLIENTS // 2
        assert told["dropped"]

        statuses, gauges = counted(site)
        assert statuses.total() == (warm + told).total()
        assert statuses["200"] >= (warm + told)["right"]
        assert statuses.keys() <= {"200", "499"}, "nothing failed; a client that left early was not answered"
        assert gauges["requests_running"] == gauges["requests_waiting"] == 0
        assert gauges["prefix_cache_bytes"] <= limits.prefix_bytes
        assert scheduler.nbytes == 0
        assert not scheduler._caches
        assert until(lambda: handles() <= files), f"{files} file handles have become {handles()}"
        assert resident() - memory < GROWTH
