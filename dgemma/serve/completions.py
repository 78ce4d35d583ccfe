"""POST /v1/completions: text as it is, behind bos, without a chat template."""

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

from anyio import to_thread
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response

from dgemma.infill import Candidate
from dgemma.language_model import LanguageModel
from dgemma.picture import Prompted
from dgemma.serve.answers import Answers, Choice, make_choices
from dgemma.serve.errors import invalid
from dgemma.serve.gap import fill
from dgemma.serve.logprobs import judge
from dgemma.serve.schema import CompletionRequest
from dgemma.serve.service import Service
from dgemma.serve.sse import event_stream
from dgemma.text.output import ContentDelta


async def complete(service: Service, body: CompletionRequest, http: HttpRequest) -> Response:
    service.check(body.model)
    head: dict[str, Any] = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion"}
    head |= {"created": int(time.time()), "model": service.name, "system_fingerprint": service.fingerprint}
    if body.suffix:
        return await _between(service, body, http, head)
    tokens = await prompt_tokens(service, body.prompts)
    # A thought may come before what is bound: the parts must be told apart then.
    prompts = [Prompted(each) for each in tokens]
    choices = await make_choices(service, body, prompts, chat=bool(body.structures), calls=False)
    answers = Answers(service, http, body, choices, steps=False)
    if body.stream:
        return event_stream(_chunks(body, answers, head), http.state.request_id)
    await answers.complete()
    if body.candidates > body.n:
        choices = await _best(service, choices, body.candidates, body.n)
    told = [_choice(i, choice.text.content, choice.reason) for i, choice in enumerate(choices)]
    return JSONResponse({**head, "choices": told, "usage": answers.usage()})


async def _between(service: Service, body: CompletionRequest, http: HttpRequest, head: dict[str, Any]) -> Response:
    answers, found = await fill(service, body, http)
    chunks = _middles(body, answers, found, head)
    if body.stream:
        return event_stream(chunks, http.state.request_id)
    told = [choice async for chunk in chunks if chunk for choice in chunk["choices"]]
    return JSONResponse({**head, "choices": told, "usage": answers.usage()})


async def _middles(
    body: CompletionRequest,
    answers: Answers,
    found: AsyncIterator[list[Candidate] | None],
    head: dict[str, Any],
) -> AsyncIterator[dict[str, Any] | None]:
    async for candidates in found:
        if candidates is None:
            yield None
            continue
        for i, candidate in enumerate(candidates[: body.n]):
            yield {**head, "choices": [_choice(i, candidate.text, "stop")]}
    if body.stream_options and body.stream_options.include_usage:
        yield {**head, "choices": [], "usage": answers.usage()}


async def prompt_tokens(service: Service, prompts: list[str | list[int]]) -> list[list[int]]:
    try:
        return await to_thread.run_sync(partial(_tokens, service.lm, prompts))
    except ValueError as error:
        raise invalid(error, "prompt") from None


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
                yield {**head, "choices": [_choice(progress.choice.index, increment.text, None)]}
        if progress.choice.reason:
            yield {**head, "choices": [_choice(progress.choice.index, "", progress.choice.reason)]}
    if body.stream_options and body.stream_options.include_usage:
        yield {**head, "choices": [], "usage": answers.usage()}


def _choice(index: int, text: str, reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}


async def _best(service: Service, choices: Sequence[Choice], made: int, wanted: int) -> list[Choice]:
    """Of each prompt's choices the likeliest ones a token, best first."""
    best: list[Choice] = []
    for first in range(0, len(choices), made):
        some = choices[first : first + made]
        answers = [choice.text.tokens for choice in some]
        logs = await judge(service, some[0].request.prompt.tolist(), answers)
        order = sorted(range(made), key=lambda i: logs[i] / max(1, len(answers[i])), reverse=True)
        best += [some[i] for i in order[:wanted]]
    return best
