"""POST /v1/chat/completions."""

import secrets
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from anyio import to_thread
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response

from dgemma.config import MediaConfig
from dgemma.decoding.events import Finished
from dgemma.language_model import LanguageModel, Message
from dgemma.media.prompt import shows
from dgemma.picture import Prompted
from dgemma.serve.answers import Answers, Choice, make_choices, on_engine
from dgemma.serve.drafts import Drafts
from dgemma.serve.errors import ApiError, invalid
from dgemma.serve.logprobs import score
from dgemma.serve.schema import ChatRequest
from dgemma.serve.service import Service
from dgemma.serve.sse import event_stream
from dgemma.text.messages import prepare_messages, prepare_tools
from dgemma.text.output import ContentDelta, Increment, ReasoningDelta, ToolCall


async def chat(service: Service, body: ChatRequest, http: HttpRequest) -> Response:
    service.check(body.model)
    prompt = await prompt_of(service, body.messages, body.offered, body.think, body.media_options)
    choices = await make_choices(
        service, body, [prompt], chat=True, calls=bool(body.offered), named=body.named is not None
    )
    answers = Answers(service, http, body, choices, steps=body.draft)
    head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": service.name}
    if body.stream:
        return event_stream(_chunks(service, body, answers, head), http.state.request_id)
    await answers.complete()
    told = [
        {
            "index": choice.index,
            "message": _message(choice),
            "logprobs": await _logprobs(service, body, choice),
            "finish_reason": choice.finish_reason,
        }
        for choice in choices
    ]
    head |= {"object": "chat.completion", "system_fingerprint": service.fingerprint}
    return JSONResponse({**head, "choices": told, "usage": answers.usage()})


async def prompt_of(
    service: Service,
    messages: list[Message],
    tools: list[dict[str, Any]] | None,
    think: bool,
    media: dict[str, int] | None = None,
) -> Prompted:
    """A conversation as the model reads it, made on another thread: a long one takes its time, and so do images, of
    which few requests are opened at once.
    """
    if think and not service.thinks:
        field = "chat_template_kwargs.enable_thinking"
        raise ApiError(400, f"{field}: this model's chat template has no thinking", field, "unsupported")
    if tools and not service.takes_tools:
        raise ApiError(400, "tools: this model's chat template takes none", "tools", "unsupported")
    try:
        MediaConfig.of(service.lm.model.config, **(media or {}))
    except ValueError as error:
        raise ApiError(400, f"media.{error}", f"media.{str(error).split()[0]}", "invalid_value") from None
    read = partial(_read, service, messages, tools, think, media)
    try:
        if not shows(messages):
            return await to_thread.run_sync(read)
        async with service.opening:
            return await to_thread.run_sync(read)
    except (ValueError, RecursionError) as error:
        raise invalid(error, "messages") from None


def _read(
    service: Service,
    messages: list[Message],
    tools: list[dict[str, Any]] | None,
    think: bool,
    media: dict[str, int] | None,
) -> Prompted:
    lm: LanguageModel = service.lm
    prepare_messages(messages)
    prepare_tools(tools or [])
    asked = [_plain(message) for message in messages] if lm.task and not shows(messages) else messages
    return lm.read(asked, think=think, tools=tools, media=media, sources=service.sources)


def _plain(message: Message) -> Message:
    """A message of text parts as one of text: an embedded model's task reads only that."""
    if not isinstance(message["content"], list):
        return message
    return {**message, "content": "".join(part["text"] for part in message["content"])}


async def _chunks(
    service: Service, body: ChatRequest, answers: Answers, head: dict[str, Any]
) -> AsyncIterator[dict[str, Any] | None]:
    head = {**head, "object": "chat.completion.chunk", "system_fingerprint": service.fingerprint}
    drafts = Drafts(answers, service.lm.tokenizer) if body.draft else None

    def chunk(choice: Choice, delta: dict[str, Any], reason: str | None = None, logprobs: Any = None) -> dict[str, Any]:
        told = {"index": choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**head, "choices": [told]}

    calls = dict.fromkeys(range(len(answers.choices)), 0)
    for choice in answers.choices:
        yield chunk(choice, {"role": "assistant", "content": ""})
    async for progress in answers.progress():
        if progress is None:
            yield None
            continue
        choice = progress.choice
        if drafts:
            yield {**head, "choices": [], "dgemma": drafts.event(progress)}
        for increment in progress.increments:
            yield chunk(choice, _delta(increment, calls[choice.index]))
            calls[choice.index] += isinstance(increment, ToolCall)
        if choice.reason:
            if drafts and not isinstance(progress.event, Finished):  # a stop string ended it
                yield {**head, "choices": [], "dgemma": drafts.finished(progress)}
            yield chunk(choice, {}, choice.finish_reason, await _logprobs(service, body, choice))
    if body.stream_options and body.stream_options.include_usage:
        yield {**head, "choices": [], "usage": answers.usage()}


def _message(choice: Choice) -> dict[str, Any]:
    text = choice.text
    message: dict[str, Any] = {"role": "assistant", "content": text.content}
    if text.reasoning:
        message["reasoning_content"] = text.reasoning
    if text.tool_calls:
        message["content"] = text.content or None
        message["tool_calls"] = [_call(call) for call in text.tool_calls]
    return message


def _delta(increment: Increment, number: int) -> dict[str, Any]:
    match increment:
        case ContentDelta():
            return {"content": increment.text}
        case ReasoningDelta():
            return {"reasoning_content": increment.text}
        case ToolCall():
            return {"tool_calls": [{"index": number, **_call(increment)}]}


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments_json}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


async def _logprobs(service: Service, body: ChatRequest, choice: Choice) -> dict[str, Any] | None:
    if not body.logprobs:
        return None
    pieces = score(service.lm, choice.request, choice.text.tokens, body.top_logprobs or 0)
    async with service.aside:
        entries = [entry async for piece in on_engine(service.engine, pieces) for entry in piece]
    return {"content": entries, "refusal": None}
