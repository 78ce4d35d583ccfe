"""DiffusionGemma: one stack of layers, two modes.

encode (causal) reads tokens and leaves their keys and values in a cache; denoise (bidirectional) reads a canvas against
that cache and returns logits. Source: the released checkpoint and transformers' models/diffusion_gemma.

Shapes: B = rows, T = tokens, C = canvas, N = all tokens flat, V = vocabulary.
"""

from collections.abc import Sequence
from itertools import zip_longest
from typing import cast

import torch
from torch import Tensor, nn

from dgemma.config import ModelConfig
from dgemma.model.attention import Attention, KeyValues, Span
from dgemma.model.cache import Cache
from dgemma.model.experts import Experts, Router
from dgemma.model.head import SelfConditioning, TiedEmbedding
from dgemma.model.kv_formats import PLAIN, PageFormat
from dgemma.model.layers import MLP, RMSNorm, inverse_frequencies
from dgemma.model.vision import VisionTower
from dgemma.picture import Picture, Placed, pieces, within

CHUNK = 1024
"""Tokens that encode takes through the stack at once, a row: longer prompts go in pieces, to the same cache."""

Rotations = dict[str, tuple[Tensor, Tensor]]


class Layer(nn.Module):
    """Attention, then a dense and a sparse branch side by side, each between its norms."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        norm = lambda: RMSNorm(config.hidden_size, config.rms_norm_eps)  # noqa: E731
        self.kind = config.layer_types[layer]
        self.input_layernorm = norm()
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = norm()
        self.pre_feedforward_layernorm = norm()
        self.mlp = MLP(config.hidden_size, config.intermediate_size)
        self.post_feedforward_layernorm_1 = norm()
        self.pre_feedforward_layernorm_2 = norm()
        self.router = Router(config)
        self.experts = Experts(config)
        self.post_feedforward_layernorm_2 = norm()
        self.post_feedforward_layernorm = norm()
        self.register_buffer("layer_scalar", torch.ones(1))
        self.register_buffer("encoder_layer_scalar", torch.ones(1))

    def forward(self, x: Tensor, spans: list[Span], cache: KeyValues, rope: Rotations) -> Tensor:
        h = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), spans, cache, rope[self.kind]))
        dense = self.post_feedforward_layernorm_1(self.mlp(self.pre_feedforward_layernorm(h)))
        sparse = self.post_feedforward_layernorm_2(self.experts(self.pre_feedforward_layernorm_2(h), *self.router(h)))
        scalar = self.encoder_layer_scalar if spans[0].causal else self.layer_scalar
        return (h + self.post_feedforward_layernorm(dense + sparse)) * scalar


class DiffusionGemma(nn.Module):
    """The network, on one device. Weights come from `dgemma.checkpoints`, or from `init_weights`.

    page_format: how its caches hold keys and values.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.page_format: PageFormat = PLAIN
        self.embed_tokens = TiedEmbedding(config)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_conditioning = SelfConditioning(config)
        self.vision = VisionTower(config.vision, config.hidden_size) if config.vision else None

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.weight.dtype

    @property
    def waits(self) -> bool:
        """Whether a pass over the layers needs the host in between; a CUDA graph can hold it where not."""
        casts_kept = torch.is_autocast_enabled(self.device.type) and torch.is_autocast_cache_enabled()
        return casts_kept or any(cast(Layer, layer).experts.waits for layer in self.layers)

    def new_cache(self, rows: int = 1) -> Cache:
        return Cache(self.config, rows, self.dtype, self.device, self.page_format)

    def cache_bytes(self, tokens: int) -> int:
        """Bytes of the pages of a row of `tokens` in a cache of this model."""
        itemsize = self.page_format.dtype(self.dtype).itemsize
        return self.config.cache_bytes(tokens, itemsize, self.page_format.scale_bytes)

    def encode(
        self,
        tokens: Tensor | Sequence[Tensor],
        cache: Cache,
        logits: bool = False,
        pictures: Sequence[Sequence[Placed]] | None = None,
    ) -> list[Tensor] | None:
        """Appends tokens to each row of the cache, causally.

        tokens: int64 [B, T], or B tensors [T_b] of any lengths (0 leaves a row as it is).
        pictures: for each row those that stand for some of its tokens, in order. One may have begun in the cache, no
        further back than a sliding layer's window reaches; none may end behind the tokens.
        With `logits`, returns float32 [T_b, V] a row: the autoregressive next-token logits. Otherwise all that lies
        behind the last layer's keys and values is skipped and None is returned.
        """
        if len(tokens) != len(cache.rows):
            raise ValueError(f"encode got {len(tokens)} rows of tokens for a cache of {len(cache.rows)}")
        rows = [torch.as_tensor(row, dtype=torch.int64, device=self.device) for row in tokens]
        shown = pictures or [[] for _ in rows]
        for placed, row, past in zip(shown, rows, cache.lengths, strict=True):
            self._check_places(placed, len(row), past)
        outputs: list[list[Tensor]] = [[] for _ in rows]
        cuts = [pieces(len(row), placed, CHUNK) for row, placed in zip(rows, shown, strict=True)]
        for parts in zip_longest(*cuts, fillvalue=(0, 0)):
            piece = [row[begin:end] for row, (begin, end) in zip(rows, parts, strict=True)]
            seen = [within(placed, *part) for placed, part in zip(shown, parts, strict=True)]
            lengths = [len(row) for row in piece]
            for i, length in enumerate(lengths):
                cache.reserve(i, length)
            spans = make_spans(lengths, cache.lengths, causal=True, pictures=seen)
            hidden = self.stack(self.embed(piece, seen), spans, cache, keys_only=not logits)
            for i, length in enumerate(lengths):
                cache.advance(i, length)
            if hidden is not None:
                for own, logit in zip(outputs, self.embed_tokens.logits(self.norm(hidden)).split(lengths), strict=True):
                    own.append(logit)
        return [torch.cat(own) if own else self._no_logits() for own in outputs] if logits else None

    def denoise(self, canvas: Tensor, cache: Cache, previous_logits: Tensor | None = None) -> Tensor:
        """Logits float32 [B, C, V] of a canvas int64 [B, C] that continues each row of the cache; that stays as it is.

        previous_logits: the last step's logits divided by its temperature, [B, C, V]; None on a first step.
        """
        soft = None
        if previous_logits is not None:
            soft = self.embed_tokens.soft(previous_logits.to(self.dtype).softmax(-1, dtype=torch.float32))
        return self.embed_tokens.logits(self.denoise_states(canvas, cache, soft))

    def denoise_states(self, canvas: Tensor, cache: Cache, soft: Tensor | None = None) -> Tensor:
        """The final states [B, C, hidden] of a canvas; `embed_tokens.logits` makes logits of them.

        soft: the last step's expected embeddings [B, C, hidden]; zero vectors, or None, where there was no last step.
        """
        if len(canvas) != len(cache.rows):
            raise ValueError(f"denoise got {len(canvas)} rows of canvas for a cache of {len(cache.rows)}")
        spans = make_spans([canvas.shape[1]] * len(canvas), cache.lengths, causal=False)
        x = self.canvas_input(canvas, soft).flatten(0, 1)
        hidden = self.stack(x, spans, cache)
        assert hidden is not None
        return self.norm(hidden).view(*canvas.shape, -1)

    def embed(self, tokens: Sequence[Tensor], pictures: Sequence[Sequence[Placed]]) -> Tensor:
        """Embeddings [N, hidden] of B rows of tokens, with the soft tokens of their pictures in their places."""
        x = self.embed_tokens(torch.cat(list(tokens)))
        placed = [(row, each) for row, some in enumerate(pictures) for each in some]
        if not placed:
            return x
        first = [sum(len(row) for row in tokens[:i]) for i in range(len(tokens))]
        at = [torch.arange(first[row] + max(0, each.begin), first[row] + each.end) for row, each in placed]
        soft = [soft[-len(own) :] for soft, own in zip(self.see([p.picture for _, p in placed]), at, strict=True)]
        return x.index_copy(0, torch.cat(at).to(x.device), torch.cat(soft))

    def see(self, pictures: Sequence[Picture]) -> list[Tensor]:
        """The soft tokens [T, hidden] of each picture; equal ones are encoded once. ValueError without a tower."""
        if self.vision is None:
            raise ValueError("this model has no vision tower: it takes no images")
        return self.vision(pictures)

    def _check_places(self, pictures: Sequence[Placed], length: int, past: int) -> None:
        """ValueError for pictures that are not in order, not within the tokens, or not as long as their soft tokens."""
        if pictures and self.config.vision is None:
            raise ValueError("this model has no vision tower: it takes no images")
        earliest = -min(past, self.config.prefix_window)
        for picture in pictures:
            if picture.begin < earliest or picture.end > length or picture.end <= 0:
                told = f"{picture.begin} … {picture.end}"
                raise ValueError(f"a picture at tokens {told} does not lie within {earliest} … {length}")
            earliest = picture.end
            assert self.config.vision
            shown = picture.picture
            soft = shown.rows * shown.columns // self.config.vision.pooling_kernel_size**2
            if picture.end - picture.begin != soft:
                raise ValueError(f"a picture of {soft} soft tokens stands for {picture.end - picture.begin} tokens")

    def canvas_input(self, canvas: Tensor, soft: Tensor | None) -> Tensor:
        """Embedded canvas [B, C, hidden] with self-conditioning added and normalised."""
        embedded = self.embed_tokens(canvas)
        return self.self_conditioning(embedded, torch.zeros_like(embedded) if soft is None else soft)

    def stack(self, x: Tensor, spans: list[Span], cache: KeyValues, keys_only: bool = False) -> Tensor | None:
        """All layers over x [N, hidden]. `keys_only` ends with the last layer's keys and values and returns None."""
        rope = self._rotations(spans)
        layers = cast(list[Layer], list(self.layers))
        for layer in layers[:-1] if keys_only else layers:
            x = layer(x, spans, cache, rope)
        if not keys_only:
            return x
        last = layers[-1]
        last.self_attn.write(last.input_layernorm(x), spans, cache, rope[last.kind])
        return None

    def _rotations(self, spans: list[Span]) -> Rotations:
        """cos and sin [N, 1, D/2] of every token's position, for each kind of layer."""
        positions = torch.cat([span.positions(self.device) for span in spans]).float()
        rotations = {}
        for kind in set(self.config.layer_types):
            size = self.config.head_size(self.config.layer_types.index(kind))
            angles = positions[:, None, None] * inverse_frequencies(self.config.rope(kind), size, self.device)
            rotations[kind] = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
        return rotations

    def _no_logits(self) -> Tensor:
        return torch.empty(0, self.config.vocab_size, device=self.device)

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> "DiffusionGemma":
        """Random weights for training from nothing, and for tests: normal with the config's initializer_range."""
        generator = torch.Generator(self.device).manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, self.config.initializer_range, generator=generator)
            elif name.endswith("q_norm.weight"):
                # Attention has scale 1: the norm starts at the usual 1/sqrt(D) instead.
                parameter.fill_(len(parameter) ** -0.5)
            else:
                parameter.fill_(1)
        return self


def make_spans(
    lengths: Sequence[int],
    past: Sequence[int],
    causal: bool,
    pictures: Sequence[Sequence[Placed]] | None = None,
) -> list[Span]:
    """Spans of rows with these new and cached lengths; neighbours that look alike share one, empty rows have none.

    pictures: for each row those among its new tokens.
    """
    spans: list[Span] = []
    for row, (length, before) in enumerate(zip(lengths, past, strict=True)):
        blocks = tuple((before + each.begin, before + each.end) for each in pictures[row]) if pictures else ()
        last = spans[-1] if spans else None
        if last and (last.row + last.rows, last.length, last.past, last.blocks) == (row, length, before, blocks):
            spans[-1] = Span(last.row, last.rows + 1, length, before, causal, blocks)
        elif length:
            spans.append(Span(row, 1, length, before, causal, blocks))
    return spans
