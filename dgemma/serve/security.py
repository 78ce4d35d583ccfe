"""Who may ask, and how much: Host header, API key, size of the body. Checked before anything is parsed."""

import asyncio
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dgemma.serve.errors import ApiError, ClientGone

LOOPBACK = ("localhost", "127.0.0.1", "::1")
PROTECTED = ("/v1/", "/tokenize", "/detokenize", "/metrics")
BODY_SECONDS = 60.0


class Guard:
    """Middleware. hosts: names that a Host header may have, or None for any; key: None for none."""

    def __init__(self, app: ASGIApp, key: str | None, body_limit: int, hosts: Sequence[str] | None):
        self.app, self.key, self.body_limit, self.hosts = app, key, body_limit, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        self._check_host(headers.get("host", ""))
        self._check_key(scope["path"], headers.get("authorization", ""))
        body = await self._body(receive)
        await self.app(scope, _again(body, receive), send)

    def _check_host(self, header: str) -> None:
        """A page elsewhere must not reach a server on loopback by having its own name resolve to it."""
        name = header[1:].partition("]")[0] if header.startswith("[") else header.rpartition(":")[0] or header
        if self.hosts is not None and name.lower() not in self.hosts:
            raise ApiError(400, f"the Host header {header!r} is not a name of this server", code="invalid_host")

    def _check_key(self, path: str, header: str) -> None:
        if self.key is None or not path.startswith(PROTECTED):
            return
        scheme, _, given = header.partition(" ")
        right = hmac.compare_digest(given.strip().encode("latin-1"), self.key.encode())
        if scheme.lower() != "bearer" or not right:
            raise ApiError(401, "a valid API key is expected: Authorization: Bearer KEY", code="invalid_api_key")

    async def _body(self, receive: Receive) -> bytes:
        """The whole body. What is too much is still read, up to a point, so that the client reads the answer."""
        parts, size = [], 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while size <= 4 * self.body_limit:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    part = message.get("body", b"")
                    size += len(part)
                    if size <= self.body_limit:
                        parts.append(part)
                    if not message.get("more_body"):
                        break
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:.0f} s", code="timeout") from None
        if size > self.body_limit:
            raise ApiError(413, f"the body is larger than {self.body_limit} bytes", code="body_too_large")
        return b"".join(parts)


def _again(body: bytes, receive: Receive) -> Receive:
    """Gives out the body once, and then what the server says: that the client is gone."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
