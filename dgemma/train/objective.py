"""The training loss of block diffusion, for a batch of examples and one or several noised canvases of each.

Shapes: B examples, S tokens (prompt, then the clean response filled to whole canvases), M canvases an example, C tokens
a canvas, V vocabulary. Source: the released model's published recipes (uniform corruption, self-conditioning).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dgemma.config import ModelConfig
from dgemma.model.attention import Span
from dgemma.model.network import DiffusionGemma, make_spans


class Tape:
    """Keys and values of encoded examples, with their gradients: the training counterpart of `model.Cache`."""

    def __init__(self, config: ModelConfig):
        self.config = config
        self.stored: dict[int, tuple[Tensor, Tensor]] = {}
        self.examples: Tensor | None = None

    def canvases_of(self, examples: Tensor) -> "Tape":
        """The same tape, read by canvas rows that belong to these examples (int64 [rows])."""
        view = Tape(self.config)
        view.stored, view.examples = self.stored, examples
        return view

    def write(self, layer: int, span: Span, keys: Tensor, values: Tensor) -> None:
        self.stored[layer] = keys, values

    def read(self, layer: int, span: Span) -> tuple[Tensor, Tensor] | None:
        if span.causal or span.past == 0:
            return None
        assert self.examples is not None
        start = self.config.first_reached(self.config.layer_types[layer], span.past)
        rows = self.examples[span.row : span.row + span.rows]
        keys, values = (t[:, :, start : span.past].index_select(0, rows) for t in self.stored[layer])
        return keys, values


@dataclass(frozen=True)
class Corruption:
    """What is drawn for one batch: clean and noised canvases [B * M, C], noise levels and self-conditioning [B * M]."""

    clean: Tensor
    noised: Tensor
    level: Tensor
    conditioned: Tensor


def corrupt(clean: Tensor, vocab_size: int, generator: torch.Generator, conditioning: float = 0.5) -> Corruption:
    """Draws t ~ U(0, 1) for each canvas [rows, C] and replaces each token, with probability t, by a uniform one.

    The draws are made on the CPU, so that a seed means the same on every device.
    """
    level = torch.rand(len(clean), generator=generator) * (1 - 2e-4) + 1e-4
    replace = torch.rand(clean.shape, generator=generator) < level[:, None]
    noise = torch.randint(vocab_size, clean.shape, generator=generator)
    conditioned = torch.rand(len(clean), generator=generator) < conditioning
    level, replace, noise, conditioned = (t.to(clean.device) for t in (level, replace, noise, conditioned))
    return Corruption(clean, torch.where(replace, noise, clean), level, conditioned)


def encode(model: DiffusionGemma, tokens: Tensor) -> Tape:
    """One causal pass over tokens [B, S]; its keys and values carry gradients."""
    tape = Tape(model.config)
    spans = make_spans([tokens.shape[1]] * len(tokens), [0] * len(tokens), causal=True)
    model.stack(model.embed_tokens(tokens.flatten()), spans, tape, keys_only=True)
    return tape


def denoise_logits(model: DiffusionGemma, canvas: Tensor, tape: Tape, starts: list[int], soft: Tensor | None) -> Tensor:
    """Logits [rows, C, V] of canvases whose prefixes are the first `starts` tokens of their examples on the tape."""
    spans = make_spans([canvas.shape[1]] * len(canvas), starts, causal=False)
    hidden = model.stack(model.canvas_input(canvas, soft).flatten(0, 1), spans, tape)
    assert hidden is not None
    return model.embed_tokens.logits(model.norm(hidden)).view(*canvas.shape, -1)


def diffusion_loss(model: DiffusionGemma, prompt: Tensor, drawn: Corruption) -> Tensor:
    """Cross-entropy [B * M, C] of the clean canvases that continue prompts [B, S].

    The rows chosen for self-conditioning get a first pass without gradients, whose expected embeddings the second pass
    sees; the others get a zero vector.
    """
    tape = encode(model, prompt)
    rows = len(drawn.clean)
    examples = torch.arange(len(prompt), device=model.device).repeat_interleave(rows // len(prompt))
    soft = torch.zeros(*drawn.clean.shape, model.config.hidden_size, dtype=model.dtype, device=model.device)
    if drawn.conditioned.any():
        chosen = drawn.conditioned.nonzero().flatten()
        with torch.no_grad():
            view = tape.canvases_of(examples[chosen])
            logits = denoise_logits(model, drawn.noised[chosen], view, [prompt.shape[1]] * len(chosen), None)
        # The first pass is not learnt from, but the embedding that its belief is expressed in is.
        soft = soft.index_put((chosen,), model.embed_tokens.soft(logits.softmax(-1)).to(soft.dtype))
    logits = denoise_logits(model, drawn.noised, tape.canvases_of(examples), [prompt.shape[1]] * rows, soft)
    return F.cross_entropy(logits.flatten(0, 1), drawn.clean.flatten(), reduction="none").view(drawn.clean.shape)
