"""DiffusionGemma on one page, in float64, slowly: where the golden results come from.

It shares no code with `dgemma.model` and `dgemma.decoding` but the image tower: no pages, no chunks, no batches, no
fused products. Every rule that an engine may get wrong is a method of its own, so that a wrong engine (`traps.py`) is
one method that differs. Shapes: T = tokens, C = canvas, V = vocabulary, K = key/value heads, D = head size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import gelu

from dgemma.checkpoints.empty import empty_model
from dgemma.checkpoints.names import stored_name
from dgemma.config import SLIDING, GenerationConfig, ModelConfig
from dgemma.conformance.adapter import Answer, Block, Encoded, Prompt, Recorded, Request
from dgemma.picture import Placed

Pieces = tuple[tuple[int, ...], ...]
Cache = list[tuple[Tensor, Tensor]]
"""Keys and values [K, T, D] of each layer."""


@dataclass
class Row:
    """A request on its way. starts: the position of each piece's first token; soft: self-conditioning [C, hidden]."""

    pieces: Pieces
    pictures: tuple[Placed, ...]
    options: GenerationConfig
    noise: Recorded
    blocks: list[Block] = field(default_factory=list)
    said: list[int] = field(default_factory=list)
    ended: bool = False
    steps: int = 0
    still: bool = False
    canvas: Tensor = field(default_factory=lambda: torch.empty(0))
    soft: Tensor = field(default_factory=lambda: torch.empty(0))
    kept: Tensor = field(default_factory=lambda: torch.empty(0))
    best: list[Tensor] = field(default_factory=list)
    seen: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    starts: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.take(self.pieces)

    def take(self, pieces: Pieces) -> None:
        """Has this prompt, its tokens side by side."""
        self.pieces, self.starts = pieces, tuple(sum(map(len, pieces[:i])) for i in range(len(pieces)))

    @property
    def length(self) -> int:
        return sum(map(len, self.pieces))

    @property
    def left(self) -> int:
        """Steps left, the coming one included."""
        return self.options.max_denoising_steps - self.steps

    @property
    def settled(self) -> bool:
        return self.still or self.left == 0


class Plain:
    """An `Adapter`, and the model for all others."""

    margin = math.inf
    """How far any decision was from going the other way: the least distance, each in its own unit."""

    def load(self, directory: Path) -> None:
        self.config = ModelConfig.from_file(directory / "config.json")
        self.defaults = GenerationConfig.from_file(directory / "generation_config.json")
        stored = {name: tensor.double() for name, tensor in load_file(directory / "model.safetensors").items()}
        prefix = "model.decoder."
        self.weights = {name.removeprefix(prefix): tensor for name, tensor in stored.items()}
        self.table = self.weights["embed_tokens.weight"]
        self.tower = None
        if self.config.vision:
            self.tower = empty_model(self.config, torch.float64).requires_grad_(False).vision
            assert self.tower
            names = list(self.tower.state_dict())
            self.tower.load_state_dict({n: stored[stored_name(f"vision.{n}")] for n in names}, assign=True)
        self.caches: dict[tuple[Pieces, tuple[int, ...]], Cache] = {}

    # ---- the network: one layer, two modes

    def w(self, layer: int, name: str) -> Tensor:
        return self.weights[f"layers.{layer}.{name}"]

    def norm(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        y = x / (x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps).sqrt()
        return y if weight is None else y * weight

    @property
    def scale(self) -> float:
        """Of embeddings; engines that compute in float32 round it so."""
        return float(np.float32(self.config.hidden_size**0.5))

    def rotated(self, x: Tensor, positions: Tensor, kind: str) -> Tensor:
        """x [T, heads, D]: pairs (i, i + D/2) turned by position * theta^(-2i/D); of full layers a share of them."""
        rope, pairs = self.config.rope(kind), x.shape[-1] // 2
        turning = pairs if rope.type == "default" else int(rope.partial * pairs)
        speeds = torch.zeros(pairs, dtype=torch.float64)
        speeds[:turning] = rope.theta ** (-torch.arange(turning, dtype=torch.float64) / pairs)
        angle = positions[:, None, None] * speeds
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), dim=-1)

    def keys_values(self, layer: int, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [K, T, D] of normalised x. A full layer stores no v_proj: values are made of its keys."""
        kind, size = self.config.layer_types[layer], self.config.head_size(layer)
        raw = (x @ self.w(layer, "self_attn.k_proj.weight").T).unflatten(-1, (-1, size))
        keys = self.rotated(self.norm(raw, self.w(layer, "self_attn.k_norm.weight")), positions, kind)
        if kind == SLIDING:
            values = self.norm((x @ self.w(layer, "self_attn.v_proj.weight").T).unflatten(-1, (-1, size)))
        else:
            values = self.tied_values(raw, keys)
        return keys.transpose(0, 1), values.transpose(0, 1)

    def tied_values(self, raw: Tensor, keys: Tensor) -> Tensor:
        """Of a full layer: the keys' projection before its norm and rotation."""
        return self.norm(raw)

    def attention(self, layer: int, x: Tensor, positions: Tensor, keys: Tensor, values: Tensor, sees: Tensor) -> Tensor:
        """sees: bool [T, S]."""
        size, kind = self.config.head_size(layer), self.config.layer_types[layer]
        q = (x @ self.w(layer, "self_attn.q_proj.weight").T).unflatten(-1, (-1, size))
        q = self.rotated(self.norm(q, self.w(layer, "self_attn.q_norm.weight")), positions, kind)
        share = q.shape[1] // keys.shape[0]
        scores = q.transpose(0, 1) @ keys.repeat_interleave(share, 0).mT
        weights = scores.masked_fill(~sees, -math.inf).softmax(-1)
        y = (weights @ values.repeat_interleave(share, 0)).transpose(0, 1).flatten(1)
        return y @ self.w(layer, "self_attn.o_proj.weight").T

    def mlp(self, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return (gelu(x @ gate.T, approximate="tanh") * (x @ up.T)) @ down.T

    def experts(self, layer: int, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        gates, ups = self.w(layer, "experts.gate_up_proj").chunk(2, dim=1)
        downs = self.w(layer, "experts.down_proj")
        rows = []
        for i in range(len(x)):
            parts = zip(weights[i], chosen[i].tolist(), strict=True)
            rows.append(sum((w * self.mlp(x[i], gates[e], ups[e], downs[e]) for w, e in parts), torch.zeros(())))
        return torch.stack(rows)

    def routed(self, layer: int, h: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(h) * self.w(layer, "router.scale") * self.config.hidden_size**-0.5
        scores = (x @ self.w(layer, "router.proj.weight").T).softmax(-1)
        weights, chosen = scores.topk(self.config.top_k_experts)
        others = scores.scatter(-1, chosen, 0.0).amax(-1)
        # Routing is less rounded than what follows: it may be decided ten times as narrowly.
        self.margin = min(self.margin, 10 * float((weights[:, -1] - others).min()))
        return weights / weights.sum(-1, keepdim=True) * self.w(layer, "router.per_expert_scale")[chosen], chosen

    def layer(
        self, i: int, x: Tensor, positions: Tensor, keys: Tensor, values: Tensor, sees: Tensor, causal: bool
    ) -> Tensor:
        norm = lambda y, name: self.norm(y, self.w(i, f"{name}.weight"))  # noqa: E731
        attended = self.attention(i, norm(x, "input_layernorm"), positions, keys, values, sees)
        h = x + norm(attended, "post_attention_layernorm")
        dense = self.mlp(norm(h, "pre_feedforward_layernorm"), *(self.w(i, f"mlp.{n}_proj.weight") for n in GATED))
        sparse = self.experts(i, norm(h, "pre_feedforward_layernorm_2"), *self.routed(i, h))
        sparse = norm(sparse, "post_feedforward_layernorm_2")
        both = norm(norm(dense, "post_feedforward_layernorm_1") + sparse, "post_feedforward_layernorm")
        return (h + both) * self.scalar(i, causal)

    def scalar(self, layer: int, causal: bool) -> Tensor:
        """The one weight that the two modes do not share."""
        twin = self.weights[f"model.encoder.language_model.layers.{layer}.layer_scalar"]
        return twin if causal else self.w(layer, "layer_scalar")

    def encoded(self, pieces: Pieces, starts: tuple[int, ...], pictures: Sequence[Placed] = ()) -> Cache:
        """All tokens at once, whatever pieces they came in: the causal mode."""
        if not pictures and (pieces, starts) in self.caches:
            return self.caches[pieces, starts]
        tokens = torch.tensor([token for piece in pieces for token in piece])
        placed = [torch.arange(start, start + len(piece)) for start, piece in zip(starts, pieces, strict=True)]
        positions = torch.cat(placed).double()
        x = self.table[tokens] * self.scale
        if pictures:
            assert self.tower
            for picture, soft in zip(pictures, self.tower([p.picture for p in pictures]), strict=True):
                x[picture.begin : picture.end] = soft
        cache: Cache = []
        for i, kind in enumerate(self.config.layer_types):
            keys, values = self.keys_values(i, self.norm(x, self.w(i, "input_layernorm.weight")), positions)
            cache.append((keys, values))
            x = self.layer(i, x, positions, keys, values, self.sees(kind, pieces, pictures), causal=True)
        if not pictures:
            self.caches[pieces, starts] = cache
        return cache

    def sees(self, kind: str, pieces: Pieces, pictures: Sequence[Placed]) -> Tensor:
        """bool [T, T]: a token sees itself and those before it, in a sliding layer no further back than the window;
        the tokens of a picture see each other."""
        token = torch.arange(sum(map(len, pieces)))
        sees = token[None] <= token[:, None]
        if kind == SLIDING:
            sees &= token[None] > token[:, None] - self.config.sliding_window
        for picture in pictures:
            sees[picture.begin : picture.end, picture.begin : picture.end] = True
        return sees

    def reached(self, kind: str, length: int) -> int:
        """The first of `length` cached tokens that the canvas sees: the same for all its positions."""
        return max(0, length - (self.config.sliding_window - 1)) if kind == SLIDING else 0

    def canvas_sees(self, kind: str, prefix: int, size: int) -> Tensor:
        """bool [C, prefix + C], behind `reached`: everything."""
        return torch.ones(size, prefix + size, dtype=torch.bool)

    def raw_logits(self, canvas: Tensor, cache: Cache, soft: Tensor, start: int) -> Tensor:
        """float64 [C, V] of a canvas whose first position is `start`, before the cap: the bidirectional mode."""
        positions = torch.arange(start, start + len(canvas)).double()
        part = lambda name: self.weights[f"self_conditioning.{name}.weight"]  # noqa: E731
        believed = self.mlp(self.norm(soft, part("pre_norm")), *(part(f"{name}_proj") for name in GATED))
        x = self.norm(self.table[canvas] * self.scale + believed)
        for i, kind in enumerate(self.config.layer_types):
            own = self.keys_values(i, self.norm(x, self.w(i, "input_layernorm.weight")), positions)
            first = self.reached(kind, cache[i][0].shape[1])
            keys, values = (torch.cat((old[:, first:], new), 1) for old, new in zip(cache[i], own, strict=True))
            sees = self.canvas_sees(kind, keys.shape[1] - len(canvas), len(canvas))
            x = self.layer(i, x, positions, keys, values, sees, causal=False)
        return self.norm(x, self.weights["norm.weight"]) @ self.table.T

    def capped(self, raw: Tensor) -> Tensor:
        cap = self.config.final_logit_softcapping
        return cap * torch.tanh(raw / cap)

    def scaled(self, raw: Tensor, temperature: float) -> Tensor:
        """First the cap, then the temperature."""
        return self.capped(raw) / temperature

    def soft(self, probabilities: Tensor) -> Tensor:
        """The expected embedding [C, hidden]."""
        return probabilities @ self.table * self.scale

    # ---- the loop

    def encode(
        self, prompts: Sequence[Prompt], canvas: np.ndarray, previous: np.ndarray | None, shared: int
    ) -> list[Encoded]:
        self.caches.clear()
        rows = [self.row(Request(prompt, {}, NO_NOISE), shared) for prompt in prompts]
        if not shared:
            self.arrange(rows)
        found = []
        for i, row in enumerate(rows):
            cache = self.prefix(rows, i, shared)
            soft = self.nothing() if previous is None else self.soft(torch.from_numpy(previous[i]).double().softmax(-1))
            raw = self.raw_logits(torch.from_numpy(canvas[i]), cache, soft, self.start(row, rows))
            kept = [self.reached(kind, cache[j][0].shape[1]) for j, kind in enumerate(self.config.layer_types)]
            keys, values = ([pair[k][:, kept[j] :] for j, pair in enumerate(cache)] for k in (0, 1))
            found.append(Encoded(single(self.capped(raw)), [single(k) for k in keys], [single(v) for v in values]))
        return found

    def generate(self, requests: Sequence[Request], shared: int) -> list[Answer]:
        self.caches.clear()
        if not shared:
            return self.together([self.row(request) for request in requests])
        answers = []
        self.written: Row | None = None
        for request in requests:
            row = self.row(request, shared)
            self.go_on(row)
            answers += self.together([row])
        return answers

    def row(self, request: Request, shared: int = 0) -> Row:
        options, prompt = self.defaults.with_options(**request.options), request.prompt
        pieces = prompt.pieces
        if shared:
            tokens = tuple(prompt.tokens)
            pieces = (tokens[:shared], tokens[shared:])
        return Row(pieces, prompt.pictures, options, request.noise)

    def together(self, rows: list[Row]) -> list[Answer]:
        """Rows side by side, each at its own pace."""
        self.rows = rows
        self.arrange(rows)
        for row in rows:
            self.begin(row)
        going = rows
        while going:
            for place, row in enumerate(going):
                self.step(row, self.cache(place, going), self.start(self.owner(place, row), going))
            settled = [row for row in going if row.settled]
            for row in settled:
                self.settle(row)
            on = [row for row in settled if not row.ended]
            starts = [self.start(self.owner(place, row), on) for place, row in enumerate(on)]
            for place, (row, start) in enumerate(zip(on, starts, strict=True)):
                owner = self.owner(place, row)
                owner.pieces += (tuple(self.committed(row).tolist()),)
                owner.starts += (start,)
            for row in on:
                self.begin(row)
            going = [row for row in going if not row.ended]
        return [Answer(row.blocks, row.said) for row in rows]

    def begin(self, row: Row) -> None:
        """A new canvas of noise; nothing is believed of it yet."""
        row.steps, row.still, row.best, row.seen = 0, False, [], []
        row.canvas = self.first_canvas(row, torch.from_numpy(row.noise.canvas[len(row.blocks)]))
        row.soft = self.first_soft(row)

    def step(self, row: Row, cache: Cache, start: int) -> None:
        block, options = len(row.blocks), row.options
        renoise, uniform = (torch.from_numpy(x[block, row.steps]) for x in (row.noise.renoise, row.noise.uniform))
        raw = self.raw_logits(row.canvas, cache, row.soft, start)
        scaled = self.scaled(raw, self.temperature(options, row.left))
        p = scaled.softmax(-1)
        entropy = -(p * scaled.log_softmax(-1)).sum(-1)
        running = p.cumsum(-1)
        proposal = (running > uniform[:, None]).int().argmax(-1)
        best = self.best(scaled, proposal)
        row.kept = self.accepted(row, entropy, options.entropy_bound)
        row.canvas = torch.where(row.kept, proposal, renoise)
        row.still = self.is_still(best, row.best, float(entropy.mean()), options)
        self.margin = min(self.margin, margin(scaled, entropy, running, uniform, row.kept, options))
        row.best.append(best)
        row.seen.append((best, row.canvas, entropy))
        row.soft = self.believed(raw, scaled)
        row.steps += 1

    def settle(self, row: Row) -> None:
        """Takes a settled canvas into the answer, cut behind the first end token or at the limit."""
        best, canvas, entropy = (torch.stack(column).numpy() for column in zip(*row.seen, strict=True))
        tokens = self.answered(row).tolist()
        ends = [i for i, token in enumerate(tokens) if token in self.end_tokens(row.options)]
        room = self.limit(row.options) - len(row.said)
        tokens = tokens[: ends[0] + 1] if ends else tokens
        row.ended = bool(ends) or len(tokens) >= room
        row.said += tokens[:room]
        row.blocks.append(Block(best, canvas, entropy.astype(np.float32), self.converged(row)))

    # ---- the rules

    def temperature(self, options: GenerationConfig, left: int) -> float:
        """From t_max down towards t_min by steps left: t_min itself is never reached."""
        return options.t_min + (options.t_max - options.t_min) * left / options.max_denoising_steps

    def best(self, scaled: Tensor, proposal: Tensor) -> Tensor:
        return scaled.argmax(-1)

    def accepted(self, row: Row, entropy: Tensor, bound: float) -> Tensor:
        """bool [C]: those of least entropy while the entropies before them sum to the bound at most. Decided anew in
        every step."""
        ascending, order = entropy.sort()
        before = ascending.cumsum(0) - ascending
        return torch.zeros_like(order, dtype=torch.bool).scatter(0, order, before <= bound)

    def is_still(self, best: Tensor, earlier: list[Tensor], mean: float, options: GenerationConfig) -> bool:
        """The best canvas equals those of the `stability_threshold` steps before, and the mean entropy is low."""
        wanted = options.stability_threshold
        same = len(earlier) >= wanted and all(torch.equal(best, old) for old in earlier[len(earlier) - wanted :])
        return same and mean < options.confidence_threshold

    def first_canvas(self, row: Row, noise: Tensor) -> Tensor:
        return noise

    def first_soft(self, row: Row) -> Tensor:
        """Zero vectors; not the expectation under zero logits."""
        return self.nothing()

    def nothing(self) -> Tensor:
        return torch.zeros(self.config.canvas_length, self.config.hidden_size, dtype=torch.float64)

    def believed(self, raw: Tensor, scaled: Tensor) -> Tensor:
        """Self-conditioning of the next step: the expected embedding under the logits divided by the temperature."""
        return self.soft(scaled.softmax(-1))

    def answered(self, row: Row) -> Tensor:
        return row.best[-1]

    def committed(self, row: Row) -> Tensor:
        """What is encoded for the next block: the clean arg-max, whole, never the noisy canvas."""
        return row.best[-1]

    def converged(self, row: Row) -> bool:
        return row.still

    def end_tokens(self, options: GenerationConfig) -> tuple[int, ...]:
        """Those of generation_config.json."""
        return options.eos_token_id

    def limit(self, options: GenerationConfig) -> int:
        return options.max_new_tokens

    def arrange(self, rows: list[Row]) -> None:
        """Rows of a batch need nothing of each other: no padding."""

    def owner(self, place: int, row: Row) -> Row:
        """Whose prefix the row at this place of a pass reads, and goes on with: its own."""
        return row

    def cache(self, place: int, going: list[Row]) -> Cache:
        owner = self.owner(place, going[place])
        return self.encoded(owner.pieces, owner.starts, owner.pictures)

    def start(self, row: Row, together: list[Row]) -> int:
        """The position of a new canvas: behind the row's own prefix, however long others are."""
        return row.length

    def prefix(self, rows: list[Row], place: int, shared: int) -> Cache:
        """The cache of one of several rows whose first `shared` tokens were encoded once."""
        row = rows[place]
        return self.encoded(row.pieces, row.starts, row.pictures)

    def go_on(self, row: Row) -> None:
        """Before a request that continues a prompt's cache: nothing that others did is in it."""


GATED = ("gate", "up", "down")
NO_NOISE = Recorded(np.empty(0), np.empty(0), np.empty(0))


def single(x: Tensor) -> np.ndarray:
    return x.float().numpy()


def margin(
    scaled: Tensor, entropy: Tensor, running: Tensor, uniform: Tensor, kept: Tensor, options: GenerationConfig
) -> float:
    """How near the decisions of a step were: the least distance in scaled logits, nats, or probability."""
    top = scaled.topk(2).values
    ascending = entropy.sort().values
    before, count = ascending.cumsum(0) - ascending, int(kept.sum())
    distances = [
        (top[:, 0] - top[:, 1]).min(),
        (before[1:] - options.entropy_bound).abs().min(),
        (running - uniform[:, None]).abs().min(-1).values.masked_fill(~kept, math.inf).min(),
        (entropy.mean() - options.confidence_threshold).abs(),
    ]
    if 0 < count < len(ascending):
        distances.append(ascending[count] - ascending[count - 1])
    return min(map(float, distances))
