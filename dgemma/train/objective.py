"""The training loss of block diffusion: a causal pass over whole examples, then noised canvases of their answers.

Shapes: R canvases, C tokens a canvas, S tokens of an example, V vocabulary. Sources: the released model's published
recipes (uniform corruption, self-conditioning, causal co-loss); arXiv 2605.22765 for the leave-one-out loss.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from dgemma.config import ModelConfig
from dgemma.model.attention import Span
from dgemma.model.network import DiffusionGemma, make_spans
from dgemma.picture import Placed, within

BUCKET = {"cuda": 128}
"""Lengths that do not differ by a multiple of this are one span, filled up and masked: a GPU is slow at many small
ones. Elsewhere only what is equal shares a span.
"""


@dataclass(frozen=True)
class Batch:
    """Canvases to be learnt, and the examples that they lie in.

    examples: int64 [S_b] each on the CPU, prompt and clean answer; owner and start: for each canvas its example and
    the position where it begins, canvases of one example side by side; clean: int64 [R, C];
    answers: (example, first token, end) of each turn that the causal loss is taken over; pictures: of each example,
    none if empty.
    """

    examples: Sequence[Tensor]
    owner: Sequence[int]
    start: Sequence[int]
    clean: Tensor
    answers: Sequence[tuple[int, int, int]] = ()
    pictures: Sequence[Sequence[Placed]] = ()

    def to(self, device: torch.device | str) -> "Batch":
        """With the canvases there; the examples stay, since `encode` lays them together first."""
        return dataclasses.replace(self, clean=self.clean.to(device))

    def before(self, row: int) -> tuple[Tensor, list[Placed]]:
        """What a canvas continues: its example's tokens before it, and their pictures."""
        owner, end = self.owner[row], self.start[row]
        return self.examples[owner][:end], within(self.pictures[owner], 0, end) if self.pictures else []

    def shown(self, ends: Sequence[int]) -> list[list[Placed]]:
        """The pictures of each example before these ends."""
        return [within(placed, 0, end) for placed, end in zip(self.pictures or [()] * len(ends), ends, strict=True)]


@dataclass(frozen=True)
class Corruption:
    """What is drawn for the canvases of a batch.

    noised: int64 [R, C]; level: float32 [R], the share of tokens replaced, in expectation; conditioned: bool [R], which
    canvases are self-conditioned by a first pass; pinned: bool [R, C], tokens given as clean, whose self-conditioning
    is certain; given: expected embeddings [R, C, hidden] of the canvases without a first pass, zeros if None.
    """

    noised: Tensor
    level: Tensor
    conditioned: Tensor
    pinned: Tensor
    given: Tensor | None = None

    def rows(self, rows: slice) -> "Corruption":
        return self._map(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str) -> "Corruption":
        return self._map(lambda tensor: tensor.to(device))

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Corruption":
        given = None if self.given is None else change(self.given)
        return Corruption(change(self.noised), change(self.level), change(self.conditioned), change(self.pinned), given)


def corrupt(
    clean: Tensor,
    vocab_size: int,
    generator: torch.Generator,
    conditioning: float = 0.5,
    infill: float = 0.0,
    exponent: float = 1.0,
) -> Corruption:
    """Draws t = u^exponent, u ~ U(0, 1), for each canvas [R, C]; each token is, with probability t, a uniform one.

    infill: share of canvases of which only one gap, of random place and length, is noised; the rest is pinned.
    The draws are made on the CPU, so that a seed means the same on every device.
    """
    rows, length = clean.shape
    uniform = lambda *shape: torch.rand(*shape, generator=generator)  # noqa: E731
    level = uniform(rows) ** exponent * (1 - 2e-4) + 1e-4
    replace = uniform(rows, length) < level[:, None]
    noise = torch.randint(vocab_size, (rows, length), generator=generator)
    conditioned = uniform(rows) < conditioning
    gap = (uniform(rows, 1) * length).long() + 1
    begin = (uniform(rows, 1) * (length - gap + 1)).long()
    at = torch.arange(length)
    pinned = (uniform(rows, 1) < infill) & ((at < begin) | (at >= begin + gap))
    noised = torch.where((replace & ~pinned).to(clean.device), noise.to(clean.device), clean)
    return Corruption(noised, *(t.to(clean.device) for t in (level, conditioned, pinned)))


class Tape:
    """Keys and values of encoded examples, with their gradients: the training counterpart of `model.Cache`.

    place: of each example the first row of the span in which it was encoded, and its number there; owner: the example
    of each canvas that reads the tape; step: see `BUCKET`.
    """

    def __init__(self, config: ModelConfig, place: Mapping[int, tuple[int, int]], owner: Sequence[int], step: int):
        self.config, self.place, self.owner, self.step = config, place, owner, step
        self.stored: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def read_by(self, owner: Sequence[int]) -> "Tape":
        """The same tape, for other canvases."""
        view = Tape(self.config, self.place, owner, self.step)
        view.stored = self.stored
        return view

    def arranged(self, start: Sequence[int]) -> list[list[int]]:
        """The canvases, which begin at positions `start`, by what they read: each group is one span."""
        nowhere = (-1, 0)
        group = lambda row: (self.place.get(self.owner[row], nowhere)[0], -(-start[row] // self.step))  # noqa: E731
        return [list(rows) for _, rows in groupby(sorted(range(len(start)), key=group), group)]

    def write(self, layer: int, span: Span, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.stored[layer, span.row] = keys, values
        return keys, values

    def read(self, layer: int, span: Span) -> tuple[Tensor, Tensor] | None:
        if span.causal or span.past == 0:
            return None
        places = [self.place[owner] for owner in self.owner[span.row : span.row + span.rows]]
        start = self.config.first_reached(self.config.layer_types[layer], min(span.pasts, default=span.past))
        rows = torch.tensor([number for _, number in places])
        keys, values = (t[:, :, start : span.past] for t in self.stored[layer, places[0][0]])
        rows = rows.to(keys.device)
        return keys.index_select(0, rows), values.index_select(0, rows)


def encode(model: DiffusionGemma, batch: Batch, causal: bool) -> tuple[Tape, Tensor | None]:
    """One causal pass over the examples, as far as canvases or the causal loss need them.

    Returns the tape and, if `causal`, the cross-entropy of every token of the batch's answers, [all of them].
    """
    ends = [0] * len(batch.examples)
    for owner, start in zip(batch.owner, batch.start, strict=True):
        ends[owner] = max(ends[owner], start)
    for example, _, stop in batch.answers if causal else ():
        ends[example] = max(ends[example], stop - 1)
    shown = batch.shown(ends)
    step = 1 if any(shown) else BUCKET.get(model.device.type, 1)
    order = sorted((e for e, end in enumerate(ends) if end), key=lambda e: ends[e])
    lengths = [-(-ends[e] // step) * step for e in order]
    pictures = [shown[e] for e in order]
    spans = make_spans(lengths, [0] * len(order), causal=True, pictures=pictures)
    place = {order[span.row + i]: (span.row, i) for span in spans for i in range(span.rows)}
    tape = Tape(model.config, place, batch.owner, step)
    if not spans:
        return tape, None
    # What fills a row up stands behind everything that is read of it.
    rows = [
        F.pad(batch.examples[e][: ends[e]], (0, length - ends[e])) for e, length in zip(order, lengths, strict=True)
    ]
    tokens = torch.cat(rows).to(model.device).split(lengths)
    hidden = model.stack(model.embed(tokens, pictures), spans, tape, keys_only=not causal)
    if hidden is None:
        return tape, None
    # A token is predicted by the state of the one before it; only those states go through the head.
    begins = dict(zip(order, accumulate(lengths, initial=0), strict=False))
    asked = torch.cat([torch.arange(begins[e] + start - 1, begins[e] + stop - 1) for e, start, stop in batch.answers])
    wanted = torch.cat([batch.examples[e][start:stop] for e, start, stop in batch.answers])
    logits = model.embed_tokens.logits(model.norm(hidden[asked.to(hidden.device)]))
    return tape, F.cross_entropy(logits, wanted.to(hidden.device), reduction="none")


def denoise_logits(model: DiffusionGemma, canvas: Tensor, tape: Tape, start: Sequence[int], soft: Tensor) -> Tensor:
    """Logits float32 [R, C, V] of canvases that begin at positions `start` of the examples on the tape."""
    groups = tape.arranged(start)
    order = [row for group in groups for row in group]
    spans, done = [], 0
    for group in groups:
        pasts = tuple(start[row] for row in group)
        differ = pasts if len(set(pasts)) > 1 else ()
        spans.append(Span(done, len(group), canvas.shape[1], max(pasts), causal=False, pasts=differ))
        done += len(group)
    place = torch.tensor(order).to(model.device)
    x = model.canvas_input(canvas, soft).index_select(0, place).flatten(0, 1)
    hidden = model.stack(x, spans, tape.read_by([tape.owner[row] for row in order]))
    assert hidden is not None
    states = hidden.view(*canvas.shape, -1).index_select(0, place.argsort())
    return model.embed_tokens.logits(model.norm(states))


def diffusion_loss(
    model: DiffusionGemma, batch: Batch, drawn: Corruption, causal: bool = False, leave_one_out: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy [R, C] of the clean canvases, at all positions, and, if `causal`, that of the answers' tokens.

    The canvases chosen for self-conditioning get a first pass without gradients, whose expected embeddings the second
    pass sees; the others get a zero vector. `leave_one_out` takes the network's output for what it would say of a token
    without having seen that token's own noised value, which is brought in by Bayes' rule before the cross-entropy.
    """
    tape, causal_loss = encode(model, batch, causal)
    nothing = torch.zeros(*drawn.noised.shape, model.config.hidden_size, dtype=model.dtype, device=model.device)
    soft = nothing if drawn.given is None else drawn.given
    chosen = drawn.conditioned.nonzero().flatten()
    if len(chosen):
        owner, start = ([values[i] for i in chosen.tolist()] for values in (batch.owner, batch.start))
        with torch.no_grad():
            logits = denoise_logits(model, drawn.noised[chosen], tape.read_by(owner), start, nothing[chosen])
        # The first pass is not learnt from, but the embedding that its belief is expressed in is.
        believed = model.embed_tokens.soft(logits.softmax(-1)).to(soft.dtype)
        certain = model.embed_tokens(batch.clean[chosen])
        soft = soft.index_put((chosen,), torch.where(drawn.pinned[chosen][..., None], certain, believed))
    logits = denoise_logits(model, drawn.noised, tape, batch.start, soft)
    if leave_one_out:
        # What a token's noised value tells of it: log(1 + V (1 - t) / t) in favour of that value.
        evidence = torch.log1p(logits.shape[-1] * (1 - drawn.level) / drawn.level)
        seen = drawn.noised[..., None]
        logits = logits.scatter_add(-1, seen, evidence[:, None, None].expand(seen.shape))
    loss = F.cross_entropy(logits.flatten(0, 1), batch.clean.flatten(), reduction="none").view(batch.clean.shape)
    return loss, causal_loss
