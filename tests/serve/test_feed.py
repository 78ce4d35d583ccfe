"""The way from the engine's thread to a reader: nothing committed is lost, and drafts do not pile up."""

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from dgemma.decoding.events import Block, Step
from dgemma.serve.feed import Feed

T = TypeVar("T")


def result(work: Coroutine[Any, Any, T]) -> T:
    """Runs it in a thread of its own: other tests may have left a loop running in this one."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


def step(number: int) -> Step:
    nothing = torch.zeros(0)
    return Step(0, 0, number, 1.0, nothing, nothing, nothing, nothing, 0.0, False)


def block(number: int) -> Block:
    return Block(0, number, [number], 1, True, 0.0)


def test_a_slow_reader_gets_every_block_and_the_latest_step() -> None:
    async def read(steps: bool) -> list[tuple[type, int]]:
        feed = Feed(steps)
        with ThreadPoolExecutor(1) as engine:
            for n in range(50):
                engine.submit(feed.put, 0, step(2 * n))
                engine.submit(feed.put, 0, step(2 * n + 1))
                engine.submit(feed.put, 0, block(n))
            engine.submit(feed.put, 0, None)
        await asyncio.sleep(0)
        got = []
        while (item := (await feed.get(5))[1]) is not None:
            assert isinstance(item, Step | Block)
            got.append((type(item), item.step if isinstance(item, Step) else item.block))
        return got

    steps, blocks = [(Step, 2 * n + 1) for n in range(50)], [(Block, n) for n in range(50)]
    assert result(read(True)) == [item for pair in zip(steps, blocks, strict=True) for item in pair]
    assert result(read(False)) == blocks


def test_silence_is_a_timeout() -> None:
    async def wait() -> bool:
        try:
            await Feed(True).get(0.01)
        except TimeoutError:
            return True
        return False

    assert result(wait())
