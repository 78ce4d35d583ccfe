"""One attention for both modes: new tokens attend to what is cached before them and to each other.

Shapes: N = tokens of all rows, flat; B rows of T tokens; H query heads, K key/value heads; S keys; D head size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgemma.config import BOTH_WAYS, SLIDING, ModelConfig
from dgemma.kernels import elementwise
from dgemma.model import layers
from dgemma.model.layers import Linear, RMSNorm

SCORES_LIMIT = 1 << 26
"""Scores held at once, in elements: longer prompts attend a slice of their queries at a time."""


@dataclass(frozen=True)
class Span:
    """Rows that look alike, side by side on the flat token axis: `length` new tokens each, after `past` cached ones.

    blocks: begins and ends, as positions in the row, of causal tokens that see each other in both directions.
    pasts: cached tokens of each row where they differ, only if not causal; `past` is then the most of them.
    """

    row: int
    rows: int
    length: int
    past: int
    causal: bool
    blocks: tuple[tuple[int, int], ...] = ()
    pasts: tuple[int, ...] = ()

    def positions(self, device: torch.device) -> Tensor:
        """Of every token, int64 [rows * length]."""
        if not self.pasts:  # without a copy to the device, which a captured graph could not hold
            return torch.arange(self.past, self.past + self.length, device=device).repeat(self.rows)
        starts = torch.tensor(self.pasts, device=device)
        return (starts[:, None] + torch.arange(self.length, device=device)).flatten()


class KeyValues(Protocol):
    """Where attention finds the keys and values before a span, and leaves those of encoded tokens."""

    def read(self, layer: int, span: Span) -> tuple[Tensor, Tensor] | None:
        """Keys and values [B, K, S, D] that the span's tokens can reach, or None where nothing is cached.

        Of rows with different pasts: what any of them can reach, and the last is that of position `past` - 1.
        """

    def write(self, layer: int, span: Span, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Takes keys and values [B, K, T, D] of the span's own tokens; returns them as they will be read."""


class Attention(nn.Module):
    """Grouped-query attention with normalised queries, keys and values and scale 1.

    Full layers store no v_proj: their values are the keys' projection, before its norm and rotation.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads = config.num_attention_heads, config.kv_heads(layer)
        self.size = config.head_size(layer)
        sliding = config.layer_types[layer] == SLIDING
        self.window = config.sliding_window if sliding else None
        self.both_ways = config.layer_types[layer] in BOTH_WAYS[config.use_bidirectional_attention]
        self.windowed = config.use_bidirectional_attention == "vision_sliding"
        hidden = config.hidden_size
        self.q_proj = Linear(hidden, self.heads * self.size)
        self.k_proj = Linear(hidden, self.kv_heads * self.size)
        self.v_proj = Linear(hidden, self.kv_heads * self.size) if sliding else None
        self.o_proj = Linear(self.heads * self.size, hidden)
        self.q_norm = RMSNorm(self.size, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.size, config.rms_norm_eps)
        self.v_norm = RMSNorm(self.size, config.rms_norm_eps, scale=False)

    def forward(self, x: Tensor, spans: list[Span], cache: KeyValues, rope: tuple[Tensor, Tensor]) -> Tensor:
        """x [N, hidden] to [N, hidden]; causal spans leave their keys and values in the cache."""
        q = layers.rotate(self.q_norm(self.q_proj(x).unflatten(-1, (self.heads, self.size))), *rope)
        k, v = self.keys_values(x, rope)
        outputs = [self._attend_span(cache, *part) for part in _by_span(spans, q, k, v)]
        return self.o_proj(torch.cat(outputs) if len(outputs) > 1 else outputs[0])

    def keys_values(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values [N, K, D] of x [N, hidden]."""
        k = self.k_proj(x).unflatten(-1, (self.kv_heads, self.size))
        v = k if self.v_proj is None else self.v_proj(x).unflatten(-1, (self.kv_heads, self.size))
        return layers.rotate(self.k_norm(k), *rope), self.v_norm(v)

    def write(self, x: Tensor, spans: list[Span], cache: KeyValues, rope: tuple[Tensor, Tensor]) -> None:
        """Only the keys and values of x: all that anyone reads of the last layer when a prompt is encoded."""
        k, v = self.keys_values(x, rope)
        for span, keys, values in _by_span(spans, k, v):
            cache.write(self.layer, span, keys, values)

    def _attend_span(self, cache: KeyValues, span: Span, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if span.causal:
            # As they will be read: then it does not matter where one call or chunk ends and the next begins.
            k, v = cache.write(self.layer, span, k, v)
        past = cache.read(self.layer, span)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        first = span.past + span.length - k.shape[2]
        blocks = [(begin - first, end - first) for begin, end in span.blocks] if self.both_ways else []
        beyond = self._beyond(span, first, q.device) if span.pasts else None
        y = attend(q, k, v, span.causal, self.window, blocks, self.windowed, beyond)
        return y.transpose(1, 2).reshape(-1, self.heads * self.size)

    def _beyond(self, span: Span, first: int, device: torch.device) -> Tensor:
        """Which of the keys before a span's own, from position `first` on, each row cannot reach: bool [B, S]."""
        past = torch.tensor(span.pasts, device=device)[:, None]
        key = torch.arange(first, span.past, device=device)
        beyond = key >= past
        if self.window is not None:
            beyond = beyond | (key <= past - self.window)
        return F.pad(beyond, (0, span.length))


def _by_span(spans: list[Span], *tensors: Tensor) -> Iterator[tuple[Any, ...]]:
    """Each span with its part [B, heads, T, D] of every tensor [N, heads, D]."""
    # Split, not sliced: the gradient of a slice is as large as the whole.
    parts = (tensor.split([span.rows * span.length for span in spans]) for tensor in tensors)
    for span, *pieces in zip(spans, *parts, strict=True):
        yield span, *(piece.unflatten(0, (span.rows, span.length)).transpose(1, 2) for piece in pieces)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    window: int | None = None,
    blocks: Sequence[tuple[int, int]] = (),
    windowed: bool = False,
    beyond: Tensor | None = None,
) -> Tensor:
    """Softmax attention of q [B, H, T, D] over k, v [B, K, S, D], scale 1; the last T keys are the queries' own.

    Not causal: every query sees every key. That is the canvas, and the rectangle of the sliding layers comes from which
    keys are given. Causal: a query sees itself and what is before it, no further back than `window` tokens; of a block,
    given by its first key and the one behind its last, also all the others, however far apart, or, if `windowed`,
    those that the window reaches. beyond: keys that a row does not see, bool [B, S], only if not causal.
    """
    batch, heads, length, size = q.shape
    kv_heads, seen = k.shape[1:3]
    masked = causal or beyond is not None
    if fits_fused(q, kv_heads, masked):
        hidden = _hidden(q, seen, 0, window, blocks, windowed) if causal else beyond
        shown = None if hidden is None else ~hidden if causal else ~hidden[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, shown, scale=1.0, enable_gqa=heads != kv_heads)
    tile = max(1, min(length, SCORES_LIMIT // (batch * heads * seen)))
    keys = k.transpose(2, 3)
    outputs = []
    for start in range(0, length, tile):
        part = q[:, :, start : start + tile]
        rows = part.shape[2]
        # Query heads that share a key head lie in one matrix: the keys are never repeated.
        scores = part.reshape(batch, kv_heads, -1, size) @ keys
        if causal:
            hidden = _hidden(part, seen, length - start - rows, window, blocks, windowed)
            grouped = scores.view(batch, kv_heads, -1, rows, seen)
            scores = grouped.masked_fill(hidden, float("-inf")).view(scores.shape)
        elif beyond is not None:
            scores = scores.masked_fill(beyond[:, None, None], float("-inf"))
        outputs.append((_softmax(scores) @ v).reshape(batch, heads, rows, size))
    return torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]


def _softmax(scores: Tensor) -> Tensor:
    if scores.dtype == torch.float32 and elementwise.fits_inference(scores):
        return elementwise.softmax_(scores)
    return scores.softmax(-1)


def fits_fused(q: Tensor, kv_heads: int, masked: bool) -> bool:
    """Whether torch has one kernel for it that is faster.

    On CUDA, not with a mask over shared key heads, nor for the widest heads. On a CPU in bfloat16, without a mask.
    """
    if q.is_cpu:
        return q.dtype == torch.bfloat16 and not masked and not (torch.is_grad_enabled() and q.requires_grad)
    return q.is_cuda and q.shape[3] <= 256 and (not masked or q.shape[1] == kv_heads)


def _hidden(
    q: Tensor, seen: int, after: int, window: int | None, blocks: Sequence[tuple[int, int]], windowed: bool
) -> Tensor:
    """bool [T, S]: keys that causal queries [B, H, T, D] do not see, the last of which has `after` keys behind it."""
    first = seen - after - q.shape[2]
    at = torch.arange(first, seen - after, device=q.device)[:, None]
    key = torch.arange(seen, device=q.device)
    hidden = key > at if window is None else (key > at) | (key <= at - window)
    for begin, end in blocks:
        own, others = slice(max(0, begin - first), max(0, end - first)), slice(max(0, begin), end)
        hidden[own, others] = (key[others] <= at[own] - window) if windowed and window else False
    return hidden
