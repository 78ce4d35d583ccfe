"""What an engine has to do to be held against the golden results, and what it is asked. It needs no torch.

Shapes: C = canvas, V = vocabulary, S = steps of a block, K = key/value heads, D = head size, R = cached tokens that a
layer can still reach: all of them in a full layer, the last `sliding_window` - 1 in a sliding one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dgemma.picture import Placed


@dataclass(frozen=True)
class Prompt:
    """Token ids in pieces, to be encoded one after the other; pictures stand for some of them, counted from the first.

    Cuts must not show. An engine that cannot cut a prompt joins the pieces.
    """

    pieces: tuple[tuple[int, ...], ...]
    pictures: tuple[Placed, ...] = ()

    @property
    def tokens(self) -> list[int]:
        return [token for piece in self.pieces for token in piece]


@dataclass(frozen=True)
class Recorded:
    """Draws of one row in place of an engine's own: canvas int64 [blocks, C]; renoise int64 and uniform float32
    [blocks, steps, C], where step 1 is the first."""

    canvas: np.ndarray
    renoise: np.ndarray
    uniform: np.ndarray


@dataclass(frozen=True)
class Request:
    """A row to generate; options: what differs from the checkpoint's generation_config.json, in its names."""

    prompt: Prompt
    options: dict[str, Any]
    noise: Recorded


@dataclass
class Encoded:
    """logits float32 [C, V] of the canvas behind a prompt; keys (rotated) and values float32 [K, R, D] of each layer,
    none if the engine does not show them."""

    logits: np.ndarray
    keys: list[np.ndarray] = field(default_factory=list)
    values: list[np.ndarray] = field(default_factory=list)


@dataclass
class Block:
    """After each step: best, the clean arg-max, and canvas, what the next step sees, both int [S, C].

    entropy: float32 [S, C] in nats; converged: it was still, not merely at its last step; None where not shown.
    """

    best: np.ndarray
    canvas: np.ndarray
    entropy: np.ndarray | None = None
    converged: bool | None = None


@dataclass
class Answer:
    """A finished row: its blocks, and its tokens, cut behind an end token and at the limit."""

    blocks: list[Block]
    tokens: list[int]


class Adapter(Protocol):
    """An engine, computing in float32. It is made without arguments."""

    def load(self, directory: Path) -> None:
        """Takes up the checkpoint of a directory, in place of the last one."""

    def encode(
        self, prompts: Sequence[Prompt], canvas: np.ndarray, previous: np.ndarray | None, shared: int
    ) -> list[Encoded]:
        """Encodes a batch of prompts and denoises once, without committing. canvas: int64 [B, C].

        previous: logits divided by their temperature, float32 [B, C, V], for self-conditioning; None on a first step.
        shared: so many first tokens are the same in all rows; an engine that can encodes them once and goes on from
        there with all rows, before any of them denoises.
        """

    def generate(self, requests: Sequence[Request], shared: int) -> list[Answer]:
        """Answers a batch of requests that run side by side, with their own noise.

        shared: if above 0, so many first tokens are the same; they are encoded once, and the requests run in turn,
        each going on from there.
        """
