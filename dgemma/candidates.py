"""Best of several: answers of different seeds as rows of one batch over one prefix, ranked by the causal mode."""

from dataclasses import replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from dgemma.decoding import blocks
from dgemma.decoding.events import Finished
from dgemma.model.cache import Cache
from dgemma.scoring import log_probabilities

if TYPE_CHECKING:
    from dgemma.language_model import Generation, LanguageModel, Prompt


def best_of(
    lm: "LanguageModel", prompt: "Prompt", count: int, seed: int, cache: Cache | None = None, **options: Any
) -> "Generation":
    """The answer, of the seeds `seed` … `seed + count - 1`, whose mean log-probability a token is the highest.

    All of them are its `candidates`, best first. Options as for `LanguageModel.request`.
    """
    if count < 1:
        raise ValueError(f"best_of must be at least 1, not {count}")
    one = lm.request(prompt, seed=seed, **options)
    if not len(one.prompt):
        raise ValueError("the prompt is empty; give at least one token")
    blocks.check_room(lm.model, one, cache.lengths[0] if cache else 0)
    started = perf_counter()
    prefix = cache.fork() if cache else lm.model.new_cache()
    with torch.inference_mode():
        lm.model.encode([one.prompt[:-1]], prefix, pictures=[one.pictures])
    shared = (perf_counter() - started) / count

    seeds = [(seed + i) % (1 << 64) for i in range(count)]
    requests = [blocks.Request(one.prompt[-1:], one.options, lm.noise(each), one.known) for each in seeds]
    events = blocks.generate(lm.model, requests, prefix.select([0] * count))
    done = {event.row: event for event in events if isinstance(event, Finished)}
    answers = [lm.result(done[row], each) for row, each in enumerate(seeds)]
    judged = log_probabilities(lm.model, prefix, int(one.prompt[-1]), [answer.tokens for answer in answers])
    ranked = [
        replace(
            answer,
            log_probability=sum(values) / len(values),
            seconds={**answer.seconds, "prefill": answer.seconds["prefill"] + shared},
        )
        for answer, values in zip(answers, judged, strict=True)
    ]
    ranked.sort(key=lambda answer: answer.log_probability or 0.0, reverse=True)
    return replace(ranked[0], candidates=ranked)
