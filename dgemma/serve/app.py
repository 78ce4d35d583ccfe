"""The FastAPI app: which path is answered by what."""

import time
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from anyio import to_thread
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from dgemma.serve.accounting import Accounting
from dgemma.serve.chat import chat, prompt_of
from dgemma.serve.completions import complete, plain_tokens
from dgemma.serve.errors import ApiError, ErrorBody, invalid, of_validation
from dgemma.serve.metrics import CONTENT_TYPE
from dgemma.serve.schema import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from dgemma.serve.score import ScoreRequest, score
from dgemma.serve.security import Guard
from dgemma.serve.service import Service

PAGE = Path(__file__).parent / "page"
UNREAD = 30.0
"""Seconds beyond the time limit that a client may take to read what it is sent."""


def make_app(
    service: Service,
    key: str | None = None,
    body_limit: int = 8 << 20,
    hosts: Sequence[str] | None = None,
    quiet: bool = False,
) -> FastAPI:
    """hosts: names that requests may be addressed to, or None for any."""
    app = FastAPI(
        title="dgemma",
        version=version("dgemma"),
        docs_url=None,
        redoc_url=None,
        responses={"default": {"model": ErrorBody, "description": "an error"}},
    )
    created = int(time.time())

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, http: Request) -> Response:
        return await chat(service, body, http)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, http: Request) -> Response:
        return await complete(service, body, http)

    @app.post("/v1/score")
    async def scores(body: ScoreRequest, http: Request) -> Response:
        return await score(service, body, http)

    def card() -> dict[str, Any]:
        told = {"id": service.name, "object": "model", "created": created, "owned_by": "dgemma"}
        return {**told, "dgemma": service.describe()}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.check(name)
        return card()

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        service.check(body.model)
        if body.messages is not None:
            think = bool(body.chat_template_kwargs and body.chat_template_kwargs.enable_thinking)
            tokens = (await prompt_of(service, body.messages, body.tools, think)).tokens
        else:
            encode = partial(plain_tokens, service.lm, body.prompt or "", body.add_special_tokens)
            try:
                tokens = await to_thread.run_sync(encode)
            except ValueError as error:
                raise invalid(error, "prompt") from None
        return {"tokens": tokens, "count": len(tokens)}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        service.check(body.model)
        return {"prompt": service.lm.tokenizer.decode(body.tokens)}

    @app.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({"status": service.status}, 200 if service.status == "ok" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/version")
    async def version_() -> dict[str, str]:
        return {"version": version("dgemma")}

    if PAGE.is_dir():
        app.mount("/page", StaticFiles(directory=PAGE))

        @app.get("/", include_in_schema=False)
        async def page() -> FileResponse:
            return FileResponse(PAGE / "index.html")

    @app.exception_handler(RequestValidationError)
    async def unfit(http: Request, error: RequestValidationError) -> JSONResponse:
        return of_validation(error.errors()).response

    @app.exception_handler(HTTPException)
    async def refused(http: Request, error: HTTPException) -> JSONResponse:
        response = ApiError(error.status_code, f"{http.method} {http.url.path}: {error.detail}").response
        response.headers.update(error.headers or {})
        return response

    paths = {route.path for route in app.routes if hasattr(route, "path") and "{" not in route.path}
    app.add_middleware(Guard, key=key, body_limit=body_limit, hosts=hosts)
    app.add_middleware(
        Accounting,
        metrics=service.metrics,
        in_work=service.in_work,
        endpoints=paths,
        time_limit=service.time_limit + UNREAD,
        quiet=quiet,
    )  # the outermost
    return app
