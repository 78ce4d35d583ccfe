"""What a generation tells the outside, in order: Prefilled, then Steps and Blocks, then Finished, for each row.

One stream of these feeds the terminal, the server, the trace and the tests. Tensors are on the CPU and never change.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Prefilled:
    """The prompt is in the cache. `tokens` were encoded, `cached` were there before."""

    row: int
    tokens: int
    cached: int
    seconds: float


@dataclass(frozen=True)
class Step:
    """One denoising step of a row, done.

    best: the clean arg-max, int64 [C], which a commit would take now; canvas: what the next step sees, int64 [C];
    accepted: bool [C]; entropy: float32 [C] in nats; step: 1, 2, 3 …; still: the row stops here by itself.
    """

    row: int
    block: int
    step: int
    temperature: float
    best: Tensor
    canvas: Tensor
    accepted: Tensor
    entropy: Tensor
    mean_entropy: float
    still: bool


@dataclass(frozen=True)
class Block:
    """A canvas is settled. `tokens`: what the text gains, cut at its end and at the limit.

    converged: it was still; otherwise the cap on steps ended it. denoise_seconds: its share of the batch's steps.
    """

    row: int
    block: int
    tokens: list[int]
    steps: int
    converged: bool
    denoise_seconds: float


@dataclass(frozen=True)
class Finished:
    """A row is complete. `tokens` is the whole text with its end token, if it has one; `reason` is "stop" or "length".

    steps, converged: one entry a block. prompt_tokens: those in the cache before the first block.
    """

    row: int
    tokens: list[int]
    reason: str
    steps: list[int]
    converged: list[bool]
    prompt_tokens: int
    prefill_seconds: float
    denoise_seconds: float
    commit_seconds: float

    @property
    def tokens_per_forward(self) -> float:
        return len(self.tokens) / max(1, sum(self.steps))


Event = Prefilled | Step | Block | Finished
