"""Around every request: an id, a line in the log, its place in the metrics, and an answer whatever goes wrong."""

import asyncio
import logging
import time
import uuid
from collections.abc import Collection

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dgemma.serve.errors import ApiError, ClientGone
from dgemma.serve.metrics import Metrics

log = logging.getLogger("dgemma.serve")
GONE = 499  # as other servers count a client who left before there was an answer


class InWork:
    """How many requests are being answered."""

    count = 0


class Accounting:
    """The outermost middleware. Handlers tell their tokens in `request.state.tokens`.

    time_limit: seconds after which a request is cut off, whatever it waits for, be it a client that does not read.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        in_work: InWork,
        endpoints: Collection[str],
        time_limit: float,
        quiet: bool,
    ):
        self.app, self.metrics, self.in_work = app, metrics, in_work
        self.endpoints, self.time_limit, self.quiet = endpoints, time_limit, quiet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status, request_id = time.perf_counter(), 0, uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state["request_id"] = request_id

        async def marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = [(b"x-request-id", request_id.encode()), (b"x-content-type-options", b"nosniff")]
                message = {**message, "headers": [*message.get("headers", []), *own]}
            await send(message)

        self.in_work.count += 1
        try:
            try:
                async with asyncio.timeout(self.time_limit):
                    await self.app(scope, receive, marked)
            except ClientGone:
                status = status or GONE
            except ApiError as error:
                await error.response(scope, receive, marked)
            except Exception:
                log.exception("request %s failed", request_id)
                if status:
                    raise
                told = f"internal error; the server's log has it under {request_id}"
                await ApiError(500, told).response(scope, receive, marked)
        finally:
            self.in_work.count -= 1
            self._note(scope, status or GONE, time.perf_counter() - started, state.get("tokens"))

    def _note(self, scope: Scope, status: int, seconds: float, tokens: int | None) -> None:
        path = scope["path"]
        endpoint = path if path in self.endpoints else "other"
        self.metrics.requests.labels(endpoint, str(status)).inc()
        self.metrics.seconds.labels(endpoint).observe(seconds)
        if not self.quiet:
            told = f" {tokens} tokens" if tokens is not None else ""
            log.info("%s %s %d %.0f ms%s", scope["method"], ascii(path)[1:-1], status, seconds * 1e3, told)
