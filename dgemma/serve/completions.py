"""POST /v1/completions: text as it is, behind bos, without a chat template."""

import secrets
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from anyio import to_thread
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response

from dgemma.language_model import LanguageModel
from dgemma.serve.answers import Answers, Choice, make_choices
from dgemma.serve.errors import invalid
from dgemma.serve.schema import CompletionRequest
from dgemma.serve.service import Service
from dgemma.serve.sse import event_stream
from dgemma.text.output import ContentDelta


async def complete(service: Service, body: CompletionRequest, http: HttpRequest) -> Response:
    service.check(body.model)
    try:
        tokens = await to_thread.run_sync(partial(_tokens, service.lm, body.prompts))
    except ValueError as error:
        raise invalid(error, "prompt") from None
    choices = make_choices(service, body, tokens, chat=False, calls=False)
    answers = Answers(service, http, body, choices, steps=False)
    head: dict[str, Any] = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion"}
    head |= {"created": int(time.time()), "model": service.name, "system_fingerprint": service.fingerprint}
    if body.stream:
        return event_stream(_chunks(body, answers, head), http.state.request_id)
    await answers.complete()
    told = [_choice(choice, choice.text.content, choice.reason) for choice in choices]
    return JSONResponse({**head, "choices": told, "usage": answers.usage()})


def plain_tokens(lm: LanguageModel, text: str, bos: bool = True) -> list[int]:
    return [lm.model.config.bos_token_id] * bos + lm.tokenizer.encode(text)


def _tokens(lm: LanguageModel, prompts: list[str | list[int]]) -> list[list[int]]:
    if not prompts:
        raise ValueError("prompt is empty; give a text or token ids")
    return [plain_tokens(lm, prompt) if isinstance(prompt, str) else lm.tokens(prompt) for prompt in prompts]


async def _chunks(
    body: CompletionRequest, answers: Answers, head: dict[str, Any]
) -> AsyncIterator[dict[str, Any] | None]:
    async for progress in answers.progress():
        if progress is None:
            yield None
            continue
        for increment in progress.increments:
            if isinstance(increment, ContentDelta):
                yield {**head, "choices": [_choice(progress.choice, increment.text, None)]}
        if progress.choice.reason:
            yield {**head, "choices": [_choice(progress.choice, "", progress.choice.reason)]}
    if body.stream_options and body.stream_options.include_usage:
        yield {**head, "choices": [], "usage": answers.usage()}


def _choice(choice: Choice, text: str, reason: str | None) -> dict[str, Any]:
    return {"index": choice.index, "text": text, "logprobs": None, "finish_reason": reason}
