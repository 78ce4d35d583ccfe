"""POST /v1/score: how probable given choices are at places of an answer. Nothing is generated."""

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Self, TypeVar

from anyio import to_thread
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response
from pydantic import Field, model_validator

from dgemma.scoring import PLACE, Question, Row, Scores, passes, prepare
from dgemma.serve.answers import on_engine
from dgemma.serve.body import Body, Objects, Text
from dgemma.serve.chat import prompt_of
from dgemma.serve.completions import prompt_tokens
from dgemma.serve.errors import ApiError, ClientGone, invalid, of_engine
from dgemma.serve.schema import Prompts, TemplateOptions, as_list
from dgemma.serve.service import Service

T = TypeVar("T")


class ScoreRequest(Body):
    """Choices at marked places of an answer. Several prompts, or templates, are as many questions; of one there may
    be many of the other.
    """

    model: str = "default"
    prompt: Prompts | None = Field(None, description="as /v1/completions reads it")
    messages: Objects | None = Field(None, min_length=1, description="as /v1/chat/completions reads them")
    template: Text | Annotated[list[Text], Field(min_length=1, max_length=64)] = Field(
        description=f"the answer, with {PLACE} where the choice belongs"
    )
    choices: Annotated[list[Text], Field(min_length=1, max_length=256)]
    steps: int = Field(1, ge=1, le=256, description="denoising steps, of which the last is read")
    seed: int = Field(0, ge=0, le=(1 << 64) - 1, description="of the noise behind the template")
    chat_template_kwargs: TemplateOptions | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt or messages must be given, and not both")
        if self.chat_template_kwargs and not self.messages:
            raise ValueError("chat_template_kwargs needs messages")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        return as_list([] if self.prompt is None else self.prompt)

    @property
    def templates(self) -> list[str]:
        return [self.template] if isinstance(self.template, str) else self.template

    @property
    def think(self) -> bool:
        return bool(self.chat_template_kwargs and self.chat_template_kwargs.enable_thinking)


async def score(service: Service, body: ScoreRequest, http: HttpRequest) -> Response:
    service.check(body.model)
    if body.messages is not None:
        read = await prompt_of(service, body.messages, None, body.think)
        if read.pictures:
            raise ApiError(400, "messages: images and video are not taken here", "messages", "unsupported")
        prompts = [read.tokens]
    else:
        prompts = await prompt_tokens(service, body.prompts)
    count = max(len(prompts), len(body.templates))
    asked = zip(_spread("prompt", prompts, count), _spread("template", body.templates, count), strict=True)
    questions = [Question(prompt, template, body.choices) for prompt, template in asked]
    try:
        rows = await to_thread.run_sync(partial(prepare, service.lm, questions, body.steps, body.seed))
        _check_memory(service, prompts)
    except ValueError as error:
        field = str(error).partition(":")[0]
        raise invalid(error, field if field in ("template", "choices") else "prompt") from None
    try:
        async with asyncio.timeout(service.time_limit):
            scores = await _scores(service, questions, rows, http)
    except TimeoutError:
        told = f"the request took longer than the server's limit of {service.time_limit:g} s"
        raise ApiError(504, told, code="timeout") from None
    except RuntimeError as error:
        raise of_engine(error) from None
    count = sum(map(len, prompts))
    usage = {"prompt_tokens": count, "completion_tokens": 0, "total_tokens": count}
    head = {"object": "list", "model": service.name, "system_fingerprint": service.fingerprint}
    return JSONResponse({**head, "data": [_told(i, each) for i, each in enumerate(scores)], "usage": usage})


def _spread(name: str, given: Sequence[T], count: int) -> Sequence[T]:
    if len(given) not in (1, count):
        told = f"{name}: there are {len(given)} for {count} questions; give one, or as many"
        raise ApiError(400, told, name, "invalid_value")
    return given if len(given) == count else [given[0]] * count


def _check_memory(service: Service, prompts: Sequence[Sequence[int]]) -> None:
    model = service.lm.model
    need = sum(model.cache_bytes(len(prompt)) for prompt in prompts)
    if need > service.limits.cache_bytes:
        raise ValueError(f"the prompts need {need >> 20} MiB of cache; there are {service.limits.cache_bytes >> 20}")


async def _scores(service: Service, questions: list[Question], rows: list[Row], http: HttpRequest) -> list[Scores]:
    """A pass at a time, between the engine's steps, for as long as the client is there."""
    found: list[Scores] = []
    async with service.aside:
        async for some in on_engine(service.engine, passes(service.lm.model, questions, rows)):
            found += some
            if await http.is_disconnected():
                raise ClientGone
    return found


def _told(index: int, scores: Scores) -> dict[str, Any]:
    pairs = zip(scores.choices, scores.probabilities, strict=True)
    choices = [{"text": text, "probability": probability} for text, probability in pairs]
    return {"object": "score", "index": index, "choices": choices, "mass": scores.mass}
