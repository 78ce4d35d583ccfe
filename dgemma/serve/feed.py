"""Events from the engine's thread to the event loop."""

import asyncio
from collections import deque
from contextlib import suppress

from dgemma.decoding.events import Event, Step

Item = Event | Exception | None
"""What a choice brings: an event, the error that ended it, or None for its end."""


class Feed:
    """Holds what its reader has not taken yet.

    Steps that nobody has taken give way to the next one, so a slow reader costs one step and the committed text.
    """

    def __init__(self, steps: bool):
        self.steps = steps
        self._loop = asyncio.get_running_loop()
        self._ready = asyncio.Event()
        self._items: deque[tuple[int, Item]] = deque()

    def put(self, choice: int, item: Item) -> None:
        """Any thread may call it; it never waits."""
        if self.steps or not isinstance(item, Step):
            with suppress(RuntimeError):  # the loop may be closed: then nobody reads
                self._loop.call_soon_threadsafe(self._put, choice, item)

    async def get(self, seconds: float) -> tuple[int, Item]:
        """The next item and its choice; TimeoutError if none comes."""
        async with asyncio.timeout(seconds):
            while not self._items:
                self._ready.clear()
                await self._ready.wait()
        return self._items.popleft()

    def _put(self, choice: int, item: Item) -> None:
        if isinstance(item, Step) and self._items and isinstance(self._items[-1][1], Step):
            self._items.pop()
        self._items.append((choice, item))
        self._ready.set()
