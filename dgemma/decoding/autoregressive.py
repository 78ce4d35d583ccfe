"""The same weights, left to right: the baseline that diffusion is compared with."""

from collections.abc import Iterator
from time import perf_counter

import torch
import torch.nn.functional as F

from dgemma.decoding.blocks import Request, check_room
from dgemma.decoding.events import Block, Event, Prefilled
from dgemma.decoding.pins import UNKNOWN
from dgemma.decoding.vocabulary import BLOCK, inverse_cdf
from dgemma.model.cache import Cache
from dgemma.model.network import DiffusionGemma


@torch.inference_mode()
def generate(
    model: DiffusionGemma, request: Request, cache: Cache | None = None, temperature: float = 0.0
) -> Iterator[Event]:
    """One token at a time through the causal mode: the most probable one, or sampled at a temperature above 0.

    Yields Prefilled, a Block of one token each, and Finished; `steps` counts one forward pass a token.
    """
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, not {temperature}")
    if not len(request.prompt):
        raise ValueError("the prompt is empty; the autoregressive mode continues from its last token")
    started = perf_counter()
    cache = cache.fork() if cache is not None else model.new_cache(1)
    cached = cache.lengths[0]
    if request.known != UNKNOWN:
        raise ValueError("pins, drafts and constraints are for diffusion; the autoregressive mode takes none")
    check_room(model, request, cached)
    token = request.prompt[-1:]
    model.encode([request.prompt[:-1]], cache, pictures=[request.pictures])
    request.prompt_tokens = cached + len(request.prompt)
    request.prefill_seconds = perf_counter() - started
    yield Prefilled(0, len(request.prompt), cached, request.prefill_seconds)

    for position in range(request.options.max_new_tokens):
        started = perf_counter()
        logits = model.encode([token], cache, logits=True)
        assert logits is not None
        token = _draw(logits[0], temperature, request, position).cpu()
        seconds = perf_counter() - started
        request.tokens.append(int(token))
        request.steps.append(1)
        request.converged.append(True)
        request.denoise_seconds += seconds
        yield Block(0, position, [int(token)], 1, True, seconds)
        if int(token) in request.options.eos_token_id:
            request.reason = "stop"
            break
    request.reason = request.reason or "length"
    yield request.finished(0)


def _draw(logits: torch.Tensor, temperature: float, request: Request, position: int) -> torch.Tensor:
    """The next token, int64 [1], from logits [1, V]; sampled by inverse CDF with the request's own uniform."""
    if temperature == 0:
        return logits.argmax(-1)
    size = logits.shape[-1]
    weights = F.pad((logits / temperature).softmax(-1), (0, -size % BLOCK))
    uniform = request.noise.uniform(position, 1)[:1].to(logits.device)
    return inverse_cdf(weights, uniform * weights.sum(-1), size)
