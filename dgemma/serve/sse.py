"""Server-sent events."""

import json
import logging
from collections.abc import AsyncIterator
from typing import Any

from fastapi.responses import StreamingResponse

from dgemma.serve.errors import ApiError, ClientGone

HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
log = logging.getLogger("dgemma.serve")


def event_stream(chunks: AsyncIterator[dict[str, Any] | None], request_id: str) -> StreamingResponse:
    """Each chunk as an event, None as a comment that keeps the connection alive; an error ends the stream as one."""
    return StreamingResponse(_events(chunks, request_id), media_type="text/event-stream", headers=HEADERS)


async def _events(chunks: AsyncIterator[dict[str, Any] | None], request_id: str) -> AsyncIterator[str]:
    try:
        async for chunk in chunks:
            yield ": keep-alive\n\n" if chunk is None else _event(chunk)
        yield "data: [DONE]\n\n"
    except ClientGone:
        pass
    except ApiError as error:
        yield _event(error.body)
    except Exception:
        log.exception("request %s failed", request_id)
        yield _event(ApiError(500, f"internal error; the server's log has it under {request_id}").body)


def _event(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n"
