"""What belongs between the prompt and the suffix of a completion, by the method of `dgemma.infill`."""

import asyncio
from collections.abc import AsyncIterator
from functools import partial

from anyio import to_thread
from fastapi import Request as HttpRequest

from dgemma.config import GAP_TOKENS, GenerationConfig
from dgemma.infill import Candidate, Layout, gap_lengths, lay_out
from dgemma.language_model import LanguageModel
from dgemma.serve.answers import KEEP_ALIVE, Answers, Choice, settled
from dgemma.serve.errors import ApiError, invalid
from dgemma.serve.logprobs import judge
from dgemma.serve.schema import CompletionRequest
from dgemma.serve.service import Service
from dgemma.serve.text import ChoiceText


async def fill(
    service: Service, body: CompletionRequest, http: HttpRequest
) -> tuple[Answers, AsyncIterator[list[Candidate] | None]]:
    """The answers on their way, one for each length of the gap; and, to be iterated over, None now and then and at last
    the candidates, best first.
    """
    seed, options = settled(service, body)
    try:
        layout, given = await to_thread.run_sync(partial(_laid_out, service.lm, body, options, seed))
    except ValueError as error:
        raise invalid(error, "suffix" if str(error).startswith("suffix") else "prompt") from None
    if body.n > len(layout.rows):
        told = f"n: {body.n} answers were asked for; up to the longest gap there are {len(layout.rows)} lengths to try"
        raise ApiError(400, told, "n", "invalid_value")
    choices = [
        Choice(
            i,
            row.request,
            ChoiceText(service.lm.tokenizer, (), (), chat=False, calls=False),
            span=(row.start, row.start + row.length),
        )
        for i, row in enumerate(layout.rows)
    ]
    answers = Answers(service, http, body, choices, steps=False, given=given)
    return answers, _candidates(service, layout, answers)


def _laid_out(lm: LanguageModel, body: CompletionRequest, options: GenerationConfig, seed: int) -> tuple[Layout, int]:
    """The rows, and how many tokens the client gave. The first of token ids stands where a text has its bos."""
    prompt, after = body.prompts[0], lm.tokenizer.encode(lm.tokenizer.plain(body.suffix or ""))
    if not after:
        raise ValueError("suffix has no tokens: the tokenizer knows none of its characters")
    if isinstance(prompt, str):
        context, before = None, lm.tokenizer.encode(lm.tokenizer.plain(prompt))
    else:
        first, *before = lm.tokens(prompt)
        context = [first]
    gaps = gap_lengths(body.max_tokens or GAP_TOKENS, None, len(after), lm.model.config.canvas_length)
    return lay_out(lm, before, after, gaps, options, seed, context), 1 + len(before) + len(after)


async def _candidates(service: Service, layout: Layout, answers: Answers) -> AsyncIterator[list[Candidate] | None]:
    async for _ in answers.progress():
        yield None
    scores = asyncio.create_task(judge(service, layout.before, layout.judged))
    try:
        while not (await asyncio.wait([scores], timeout=KEEP_ALIVE))[0]:
            yield None
        yield layout.ranked(service.lm.tokenizer, scores.result())
    finally:
        scores.cancel()
