"""The left-to-right mode against the reference's full causal forward, token by token."""

from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from parity.reference import make_reference, reference_causal_logits, tokens
from parity.trajectory import CONFIG, OPTIONS

from dgemma.decoding import autoregressive
from dgemma.decoding.blocks import Request
from dgemma.decoding.events import Block, Finished, Prefilled
from dgemma.decoding.noise import Noise
from dgemma.model.network import DiffusionGemma

NEVER = (CONFIG.vocab_size + 1,)


@lru_cache(maxsize=1)
def pair() -> tuple[DiffusionGemma, Any]:
    return make_reference(CONFIG, 11)


def run(prompt, cache=None, temperature=0.0, seed=0, **options):
    noise = Noise(seed, CONFIG.vocab_size, CONFIG.canvas_length)
    request = Request(prompt, replace(OPTIONS, **options), noise)
    return list(autoregressive.generate(pair()[0], request, cache, temperature)), noise


@pytest.mark.parametrize("length", [1, 5, 20])
def test_greedy_is_the_references_argmax(length):
    prompt = tokens((length,), CONFIG.vocab_size, length)
    (first, *blocks, last), _ = run(prompt, max_new_tokens=12, eos_token_id=NEVER)
    assert isinstance(first, Prefilled)
    assert isinstance(last, Finished)
    assert [token for block in blocks for token in block.tokens] == last.tokens
    text = prompt
    for token in last.tokens:
        assert token == int(reference_causal_logits(pair()[1], text[None])[0, -1].argmax())
        text = torch.cat((text, torch.tensor([token])))
    assert len(last.tokens) == 12
    assert last.reason == "length"
    assert last.steps == [1] * 12
    assert last.tokens_per_forward == 1


@pytest.mark.parametrize("temperature", [4.0, 12.0])
def test_sampled_is_the_inverse_cdf_of_the_references_distribution(temperature):
    prompt = tokens((6,), CONFIG.vocab_size, 1)
    events, noise = run(prompt, temperature=temperature, seed=5, max_new_tokens=20, eos_token_id=NEVER)
    text, differs = prompt, 0
    for position, token in enumerate(events[-1].tokens):
        logits = reference_causal_logits(pair()[1], text[None])[0, -1].double()
        running = (logits / temperature).softmax(-1).cumsum(-1)
        assert token == int((running > noise.uniform(position, 1)[0]).int().argmax())
        differs += token != int(logits.argmax())
        text = torch.cat((text, torch.tensor([token])))
    assert differs


def test_an_end_token_ends_and_is_kept():
    prompt = tokens((6,), CONFIG.vocab_size, 2)
    free = run(prompt, temperature=2.0, max_new_tokens=20, eos_token_id=NEVER)[0][-1].tokens
    at = next(i for i in range(3, 20) if free[i] not in free[:i])
    events, _ = run(prompt, temperature=2.0, max_new_tokens=20, eos_token_id=(NEVER[0], free[at]))
    assert events[-1].tokens == free[: at + 1]
    assert events[-1].reason == "stop"
    assert sum(isinstance(event, Block) for event in events) == at + 1


def test_an_end_token_at_the_limit_is_a_stop():
    prompt = tokens((6,), CONFIG.vocab_size, 2)
    free = run(prompt, temperature=2.0, max_new_tokens=4, eos_token_id=NEVER)[0][-1].tokens
    assert free[3] not in free[:3]
    last = run(prompt, temperature=2.0, max_new_tokens=4, eos_token_id=(free[3],))[0][-1]
    assert (last.tokens, last.reason) == (free, "stop")


def test_a_given_cache_is_continued_and_left_alone():
    prompt = tokens((14,), CONFIG.vocab_size, 3)
    whole = run(prompt, max_new_tokens=6)[0][-1]
    cache = pair()[0].new_cache()
    with torch.no_grad():
        pair()[0].encode([prompt[:9]], cache)
    (first, *_, last), _ = run(prompt[9:], cache, max_new_tokens=6)
    assert last.tokens == whole.tokens
    assert (first.tokens, first.cached, last.prompt_tokens) == (5, 9, 14)
    assert cache.lengths == [9]


def test_wrong_values_are_named():
    with pytest.raises(ValueError, match="temperature must be at least 0, not -1"):
        run(tokens((3,), 48, 0), temperature=-1.0)
    with pytest.raises(ValueError, match="the prompt is empty"):
        run(torch.empty(0, dtype=torch.int64))
