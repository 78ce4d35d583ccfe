"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

import re
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import BaseModel

from dgemma.engine.engine import Closed
from dgemma.engine.scheduler import QueueFull

TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "service_unavailable_error"}
_FIELD = re.compile(r"(?:messages|tools)(?:\[\d+\]|\.\w+)*")


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


class ApiError(Exception):
    """What a client is told. `param` is the field at fault."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, _utf8(message), param and _utf8(param), code

    @property
    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "timeout_error" if self.status == 504 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        headers = {"Retry-After": "1"} if self.status in (429, 503) else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body, self.status, headers)


class ClientGone(Exception):  # noqa: N818
    """Nobody is left to answer."""


def invalid(error: Exception, param: str) -> ApiError:
    """400 for a value that the layers below refuse; the field is the one that their message begins with, if it does."""
    if isinstance(error, RecursionError):
        return ApiError(400, f"{param} is nested too deeply", param, "invalid_value")
    named = _FIELD.match(str(error))
    return ApiError(400, str(error), named[0] if named else param, "invalid_value")


def _utf8(text: str) -> str:
    """What a client wrote may hold halves of surrogate pairs, which no answer can."""
    return text.encode("utf-8", "replace").decode()


def of_engine(error: Exception) -> Exception:
    """The engine's error as the client sees it; one that is nobody's fault but ours stays what it is."""
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), code="queue_full")
    if isinstance(error, Closed):
        return closing()
    return error


def closing() -> ApiError:
    return ApiError(503, "the server is closing and takes no more requests", code="closing")


def of_validation(errors: Any) -> ApiError:
    """The first of pydantic's errors, with the path of its field."""
    field = errors[0]["loc"][:2]
    # Of a union's branches, the one that fits best is the one whose error lies deepest.
    first = max((error for error in errors if error["loc"][:2] == field), key=lambda error: len(error["loc"]))
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['ctx']['error']}", code="invalid_json")
    path, parts, unknown = "", first["loc"][1:], first["type"] == "extra_forbidden"
    for i, part in enumerate(parts):
        clients_own = unknown and i == len(parts) - 1  # which may be spelled in any way
        if isinstance(part, int):
            path += f"[{part}]"
        elif clients_own or (part.isidentifier() and part.islower() and part != "str"):  # others name a union's branch
            path += f".{part}" if path else part
    message = "the field is not known" if unknown else first["msg"]
    if not path and first["type"] == "value_error":  # of several fields; it begins with one of them
        told = str(first["ctx"]["error"])
        return ApiError(400, told, told.split()[0], "invalid_value")
    if not path and not unknown:
        return ApiError(400, f"the body must be a JSON object, sent as application/json: {message}")
    code = "unknown_field" if unknown else "invalid_value"
    return ApiError(400, f"{path}: {message.removeprefix('Value error, ')}", path, code)
