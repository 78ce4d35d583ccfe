"""Many requests from a file, answered by the same app as over HTTP: OpenAI's batch format, each line once.

A result carries the number of its request's line, so a run that was ended at any moment goes on where it was: a last
line that is not whole is taken away, and what has a result is passed over.
"""

import asyncio
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import httpx
from fastapi import FastAPI

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/score")
ID = "batch_req_"


class LineError(ValueError):
    """A line that is no request. `custom_id` as far as it is known."""

    def __init__(self, message: str, custom_id: str | None = None):
        super().__init__(message)
        self.custom_id = custom_id


@contextmanager
def results(path: Path) -> Iterator[tuple[BinaryIO, dict[int, str | None]]]:
    """The file that results are appended to, by this run alone, and the custom id of each line that has one.

    ValueError if it holds anything else, BlockingIOError if another run writes to it.
    """
    with path.open("a+b") as file:
        _claim(file, path)
        file.seek(0)
        whole, done = 0, dict[int, str | None]()
        for line in file:
            if not line.endswith(b"\n"):  # what a run was ended in
                break
            whole += len(line)
            number, custom_id = _answered(line, path, len(done) + 1)
            done[number] = custom_id
        file.truncate(whole)
        yield file, done


def _claim(file: BinaryIO, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BlockingIOError(f"another run is writing to {path}") from None


def _answered(line: bytes, path: Path, at: int) -> tuple[int, str | None]:
    try:
        result = json.loads(line)
        return int(result["id"].removeprefix(ID)), result["custom_id"]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"{path}, line {at}, is no result of a batch: choose another file") from None


def read_request(line: bytes) -> tuple[str, str, dict[str, Any]]:
    """custom_id, path and body of a line; LineError says what is wrong with it."""
    try:
        given = json.loads(line)
    except ValueError as error:
        raise LineError(f"not JSON: {error}") from None
    if not isinstance(given, dict):
        raise LineError(f"a JSON object is expected, not {type(given).__name__}")
    custom_id, body = given.get("custom_id"), given.get("body")
    if not isinstance(custom_id, str):
        raise LineError("custom_id: a string is expected")
    if given.get("method", "POST") != "POST":
        raise LineError(f"method: only POST is known, not {given['method']!r}", custom_id)
    if given.get("url") not in PATHS:
        raise LineError(f"url: {given.get('url')!r} is not one of {', '.join(PATHS)}", custom_id)
    if not isinstance(body, dict):
        raise LineError("body: a JSON object is expected", custom_id)
    if body.get("stream"):
        raise LineError("body.stream: a batch has no streams", custom_id)
    return custom_id, given["url"], body


async def answer(
    app: FastAPI,
    lines: Iterable[bytes],
    out: BinaryIO,
    done: dict[int, str | None],
    at_once: int,
    tell: Callable[[int, int], None],
) -> None:
    """Answers what has no result yet, so many requests at once; results come in the order in which they are ready.

    tell: called after each with the number of results that there are now and how many of this run's are errors.
    ValueError if a line that has a result is now another request; OSError if the model failed at one.
    """
    room, failed = asyncio.Semaphore(at_once), 0

    async def one(number: int, line: bytes, client: httpx.AsyncClient) -> None:
        nonlocal failed
        result: dict[str, Any] = {"id": f"{ID}{number}", "custom_id": None, "response": None, "error": None}
        try:
            result["custom_id"], path, body = read_request(line)
            got = await client.post(path, json=body)
            if got.status_code in (500, 503):
                raise OSError(f"line {number}: {got.text}; it has no result, so that another run answers it")
            told = {"status_code": got.status_code, "request_id": got.headers["x-request-id"], "body": got.json()}
            result["response"] = told
            failed += got.status_code != 200
        except LineError as error:
            result["custom_id"], failed = error.custom_id, failed + 1
            result["error"] = {"code": "invalid_line", "message": f"line {number}: {error}"}
        out.write(json.dumps(result, ensure_ascii=False).encode() + b"\n")
        out.flush()
        os.fsync(out.fileno())
        done[number] = result["custom_id"]
        tell(len(done), failed)
        room.release()

    transport = httpx.ASGITransport(app)
    async with (
        httpx.AsyncClient(transport=transport, base_url="http://batch", timeout=None) as client,
        asyncio.TaskGroup() as group,
    ):
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            if number in done:
                _same(line, number, done[number])
                continue
            await room.acquire()
            group.create_task(one(number, line, client))


def _same(line: bytes, number: int, custom_id: str | None) -> None:
    try:
        now: str | None = read_request(line)[0]
    except LineError as error:
        now = error.custom_id
    if now != custom_id:
        raise ValueError(f"line {number} is {now!r}, but its result is of {custom_id!r}: the requests have changed")
