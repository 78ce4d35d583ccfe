"""Log-probabilities of committed tokens, by the causal mode, after the fact: a denoised canvas has none of its own."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from dgemma.decoding.blocks import Request
from dgemma.language_model import LanguageModel
from dgemma.scoring import left_to_right
from dgemma.serve.answers import on_engine
from dgemma.serve.service import Service
from dgemma.text.tokenizer import Tokenizer

CHUNK = 256
"""Tokens whose logits are held at once."""


@torch.inference_mode()
def score(lm: LanguageModel, request: Request, answer: Sequence[int], top: int) -> Iterator[list[dict[str, Any]]]:
    """OpenAI's entries for an answer's tokens, its special tokens included, in pieces: {token, logprob, bytes,
    top_logprobs}, in nats.
    """
    prompt, cache = request.prompt, lm.model.new_cache()
    lm.model.encode([prompt[:-1]], cache, pictures=[request.pictures])
    read = [int(prompt[-1]), *answer[:-1]]
    for at in range(0, len(answer), CHUNK):
        logits = lm.model.encode([torch.tensor(read[at : at + CHUNK])], cache, logits=True)
        assert logits is not None
        entries = []
        for token, row in zip(answer[at : at + CHUNK], logits[0].log_softmax(-1), strict=True):
            likeliest = row.topk(min(top, len(row)))
            best = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
            others = [_entry(lm.tokenizer, other, value) for other, value in best]
            entries.append({**_entry(lm.tokenizer, token, row[token].item()), "top_logprobs": others})
        yield entries


async def judge(service: Service, before: Sequence[int], answers: Sequence[Sequence[int]]) -> list[float]:
    """The log-probability of each answer to the same prompt, in nats."""
    logs = [0.0] * len(answers)
    async with service.aside:
        async for parts in on_engine(service.engine, _passes(service.lm, before, answers)):
            logs = [log + sum(part) for log, part in zip(logs, parts, strict=True)]
    return logs


@torch.inference_mode()
def _passes(lm: LanguageModel, before: Sequence[int], answers: Sequence[Sequence[int]]) -> Iterator[list[list[float]]]:
    cache = lm.model.new_cache()
    lm.model.encode([torch.tensor(before[:-1], dtype=torch.int64)], cache)
    yield from left_to_right(lm.model, cache, before[-1], answers)


def _entry(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    text = tokenizer.decode([token])
    raw = [int(tokenizer.token(token)[3:5], 16)] if token in tokenizer.byte_ids else list(text.encode())
    return {"token": text, "logprob": logprob, "bytes": raw}
