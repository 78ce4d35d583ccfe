"""What a request says of its answer, made ready for the engine: pins, a draft, a constraint."""

import asyncio
from dataclasses import replace
from functools import partial

from anyio import to_thread

from dgemma.config import GenerationConfig
from dgemma.decoding.pins import UNKNOWN, Known
from dgemma.language_model import LanguageModel
from dgemma.serve.errors import ApiError, invalid
from dgemma.serve.schema import Generate
from dgemma.serve.service import Service

SECONDS = 20.0
"""What a constraint may take to compile."""
LEVEL = 0.5
"""Of a draft, if the request does not tell."""


async def known_of(service: Service, body: Generate, options: GenerationConfig) -> Known:
    """On another thread, and few at once: a large schema takes seconds. ApiError for what no answer can match."""
    if not body.known:
        return UNKNOWN
    make = partial(_made, service.lm, body, options)
    async with service.compiling:
        try:
            async with asyncio.timeout(SECONDS):
                return await to_thread.run_sync(make, abandon_on_cancel=True)
        except TimeoutError:
            field = body.known[-1]
            told = f"{field}: it takes more than {SECONDS:.0f} s to prepare; simplify it"
            raise ApiError(400, told, field, "invalid_value") from None


def _made(lm: LanguageModel, body: Generate, options: GenerationConfig) -> Known:
    draft = lm.tokenizer.encode(body.draft_text) if body.draft_text else body.seed_canvas or ()
    level = body.noise_level or (LEVEL if draft else 1.0)
    known = Known(body.pinned, tuple(draft), level)
    try:
        known.check(options, lm.model.config)
    except ValueError as error:
        drafted = [field for field in body.known if "draft" in str(error) and "pin" not in field]
        raise invalid(error, (drafted or body.known)[0]) from None
    for structure in body.structures:
        try:
            automaton = lm.automaton(structure.make(), options, body.think)
        except RecursionError as error:
            raise invalid(error, structure.field) from None
        except (ValueError, OSError) as error:
            raise ApiError(400, f"{structure.field}: {error}", structure.field, "invalid_value") from None
        known = replace(known, constraint=automaton)
        try:
            _check_limit(known, options, lm)
        except ValueError as error:
            raise invalid(error, "max_tokens") from None
    return known


def _check_limit(known: Known, options: GenerationConfig, lm: LanguageModel) -> None:
    """Before anything is done for each position of an answer, that there are so many."""
    length, have = known.length(options), lm.model.config.max_position_embeddings
    if length > have:
        raise ValueError(f"an answer of {length} tokens needs as many positions; the model has {have}")
    known.check(options, lm.model.config)
