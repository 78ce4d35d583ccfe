"""Log-probabilities of committed tokens, by the causal mode, after the fact: a denoised canvas has none of its own."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from dgemma.language_model import LanguageModel
from dgemma.text.tokenizer import Tokenizer

CHUNK = 256
"""Tokens whose logits are held at once."""


@torch.inference_mode()
def score(lm: LanguageModel, prompt: torch.Tensor, answer: Sequence[int], top: int) -> Iterator[list[dict[str, Any]]]:
    """OpenAI's entries for an answer's tokens, its special tokens included, in pieces: {token, logprob, bytes,
    top_logprobs}, in nats.
    """
    cache = lm.model.new_cache()
    lm.model.encode([prompt[:-1]], cache)
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


def _entry(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    text = tokenizer.decode([token])
    raw = [int(tokenizer.token(token)[3:5], 16)] if token in tokenizer.byte_ids else list(text.encode())
    return {"token": text, "logprob": logprob, "bytes": raw}
