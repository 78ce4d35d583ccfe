"""Engines that are wrong in one way each: mistakes that other engines were seen to make.

Their results are recorded beside the right ones, so that a report can say which mistake a difference looks like. The
docstring is what the report tells.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dgemma.config import SLIDING, GenerationConfig
from dgemma.conformance.plain import Cache, Pieces, Plain, Row
from dgemma.picture import Placed


class HistoryIncludesTheCurrentStep(Plain):
    """the stability test compares a step with itself"""

    def is_still(self, best: Tensor, earlier: list[Tensor], mean: float, options: GenerationConfig) -> bool:
        return super().is_still(best, [*earlier, best], mean, options)


class AcceptsOnTheWholeSum(Plain):
    """acceptance compares the sum including a position's own entropy with the bound: sometimes nothing is accepted"""

    def accepted(self, row: Row, entropy: Tensor, bound: float) -> Tensor:
        ascending, order = entropy.sort()
        return torch.zeros_like(order, dtype=torch.bool).scatter(0, order, ascending.cumsum(0) <= bound)


class AcceptanceSticks(Plain):
    """a position once accepted stays accepted"""

    def accepted(self, row: Row, entropy: Tensor, bound: float) -> Tensor:
        accepted = super().accepted(row, entropy, bound)
        return accepted | row.kept if row.steps else accepted


class TemperatureByStepsDone(Plain):
    """the temperature rises with the steps done instead of falling with the steps left"""

    def temperature(self, options: GenerationConfig, left: int) -> float:
        return super().temperature(options, options.max_denoising_steps - left)


class TemperatureReachesTMin(Plain):
    """the temperature is a step ahead: it reaches t_min"""

    def temperature(self, options: GenerationConfig, left: int) -> float:
        return super().temperature(options, left - 1)


class AnswersWithTheNoisyCanvas(Plain):
    """the answer is the canvas with its fresh noise instead of the clean arg-max"""

    def answered(self, row: Row) -> Tensor:
        return row.canvas


class CommitsTheNoisyCanvas(Plain):
    """the next block's prefix is the canvas with its fresh noise instead of the clean arg-max"""

    def committed(self, row: Row) -> Tensor:
        return row.canvas


class CommitsTheProposal(Plain):
    """the sampled tokens count as the best canvas"""

    def best(self, scaled: Tensor, proposal: Tensor) -> Tensor:
        return proposal


class ZeroLogitsOnTheFirstStep(Plain):
    """the first step is conditioned on zero logits, the mean embedding, instead of a zero vector"""

    def first_soft(self, row: Row) -> Tensor:
        even = torch.full((self.config.canvas_length, self.config.vocab_size), 1 / self.config.vocab_size)
        return self.soft(even.double())


class StaleSelfConditioningInANewBlock(Plain):
    """a new block begins with the last one's self-conditioning"""

    def first_soft(self, row: Row) -> Tensor:
        return row.soft if row.blocks else super().first_soft(row)


class FeedsBackUnscaledLogits(Plain):
    """self-conditioning takes the logits before they are divided by the temperature"""

    def believed(self, raw: Tensor, scaled: Tensor) -> Tensor:
        return self.soft(self.capped(raw).softmax(-1))


class SoftCapInBfloat16(Plain):
    """the soft cap is computed in bfloat16"""

    def capped(self, raw: Tensor) -> Tensor:
        cap = self.config.final_logit_softcapping
        return (torch.tanh(raw.bfloat16() / cap) * cap).double()


class SoftCapAfterTemperature(Plain):
    """the logits are divided by the temperature before the soft cap"""

    def scaled(self, raw: Tensor, temperature: float) -> Tensor:
        return self.capped(raw / temperature)

    def believed(self, raw: Tensor, scaled: Tensor) -> Tensor:
        return self.soft(scaled.softmax(-1))


class RightPaddingIsAttended(Plain):
    """shorter rows of a batch are padded on the right, and the padding is read"""

    def arrange(self, rows: list[Row]) -> None:
        for row, missing in zip(rows, missing_tokens(rows), strict=True):
            row.take(((*row.pieces[0], *[0] * missing), *row.pieces[1:]))


class LeftPaddingIsAttended(Plain):
    """shorter rows of a batch are padded on the left, and the padding is read"""

    def arrange(self, rows: list[Row]) -> None:
        for row, missing in zip(rows, missing_tokens(rows), strict=True):
            row.take(((*[0] * missing, *row.pieces[0]), *row.pieces[1:]))


def missing_tokens(rows: list[Row]) -> list[int]:
    return [max(row.length for row in rows) - row.length for row in rows]


class RightPaddingLeavesAGapInPositions(Plain):
    """canvases of shorter rows begin at the position of the longest"""

    def start(self, row: Row, together: list[Row]) -> int:
        return max(other.length for other in together)


class RowsReadTheirNeighboursPrefix(Plain):
    """once a row has stopped, others read the wrong rows of the cache"""

    def owner(self, place: int, row: Row) -> Row:
        return self.rows[place]


class PrefixIsStaleAfterACommit(Plain):
    """canvases after the first still read the prompt alone: committed blocks are not seen"""

    def cache(self, place: int, going: list[Row]) -> Cache:
        row = going[place]
        first = len(row.pieces) - len(row.blocks)
        return self.encoded(row.pieces[:first], row.starts[:first], row.pictures)


class ChunksAreReadInBothDirections(Plain):
    """a piece of a prompt, or a commit, is encoded as if it were a canvas: its tokens see what follows them"""

    def sees(self, kind: str, pieces: Pieces, pictures: Sequence[Placed]) -> Tensor:
        token, piece, first = places(pieces)
        before = token[None] < first[:, None]
        if kind == SLIDING:
            before &= token[None] > first[:, None] - self.config.sliding_window
        return (piece[None] == piece[:, None]) | before


class ChunksForgetThoseBefore(Plain):
    """a piece of a prompt, or a commit, does not see the pieces before it"""

    def sees(self, kind: str, pieces: Pieces, pictures: Sequence[Placed]) -> Tensor:
        _, piece, _ = places(pieces)
        return super().sees(kind, pieces, pictures) & (piece[None] == piece[:, None])


def places(pieces: Pieces) -> tuple[Tensor, Tensor, Tensor]:
    """Of each token its place, the number of its piece, and the place where that begins, int64 [T]."""
    lengths = torch.tensor([len(piece) for piece in pieces])
    piece = torch.arange(len(pieces)).repeat_interleave(lengths)
    return torch.arange(len(piece)), piece, (lengths.cumsum(0) - lengths)[piece]


class EndTokensFromConfigJson(Plain):
    """end tokens are those of config.json, which lacks the third"""

    def end_tokens(self, options: GenerationConfig) -> tuple[int, ...]:
        return self.config.eos_token_id


class AnswersAreWholeCanvases(Plain):
    """an answer is not cut at a limit that lies within a canvas"""

    def limit(self, options: GenerationConfig) -> int:
        size = self.config.canvas_length
        return -(-options.max_new_tokens // size) * size


class LastCanvasIsCutToTheLimit(Plain):
    """the last canvas is shorter than the others, filled up with padding"""

    def first_canvas(self, row: Row, noise: Tensor) -> Tensor:
        room = row.options.max_new_tokens - len(row.blocks) * len(noise)
        return torch.where(torch.arange(len(noise)) < room, noise, 0)


class FinishedCountsAsConverged(Plain):
    """a block that ran into its last step is called converged"""

    def converged(self, row: Row) -> bool:
        return True


class GenerationWritesThePromptsCache(Plain):
    """a generation leaves its own tokens in the prompt's cache, and the next one reads them"""

    def go_on(self, row: Row) -> None:
        if self.written:
            row.take((*self.written.pieces, *row.pieces[1:]))
        self.written = row


class ForksShareThePageBeingFilled(Plain):
    """those who continue a prompt's cache share its last, unfinished page and overwrite each other there"""

    def prefix(self, rows: list[Row], place: int, shared: int) -> Cache:
        own, last = super().prefix(rows, place, shared), super().prefix(rows, len(rows) - 1, shared)
        page = self.config.canvas_length
        if not shared or not shared % page:
            return own
        full = (shared // page + 1) * page
        length = min(full, own[0][0].shape[1], last[0][0].shape[1])
        merge = lambda mine, others: torch.cat((others[:, :length], mine[:, length:]), 1)  # noqa: E731
        return [(merge(a[0], b[0]), merge(a[1], b[1])) for a, b in zip(own, last, strict=True)]


class GroupedExpertsMixUpTheirWeights(Plain):
    """tokens are grouped by expert, and get each other's router weights"""

    def experts(self, layer: int, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        order = chosen.flatten().argsort()
        return super().experts(layer, x, weights.flatten()[order].view_as(weights), chosen)


class GroupedExpertsRoundToBfloat16(Plain):
    """the experts' input is rounded to bfloat16"""

    def experts(self, layer: int, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        return super().experts(layer, x.bfloat16().double(), weights, chosen)


class TheWindowReachesOneTokenTooFar(Plain):
    """the canvas sees as many cached tokens as the window counts, instead of one fewer"""

    def reached(self, kind: str, length: int) -> int:
        return max(0, length - self.config.sliding_window) if kind == SLIDING else 0


class TheCanvasSeesABandOfThePrefix(Plain):
    """each canvas position has a window of its own in the prefix: a band instead of a rectangle"""

    def canvas_sees(self, kind: str, prefix: int, size: int) -> Tensor:
        if kind != SLIDING:
            return super().canvas_sees(kind, prefix, size)
        at, key = torch.arange(prefix, prefix + size)[:, None], torch.arange(prefix + size)[None]
        return (key >= prefix) | (key > at - self.config.sliding_window)


class ValuesAreTheRotatedKeys(Plain):
    """values of full layers are made of the keys after their norm and rotation instead of the projection before"""

    def tied_values(self, raw: Tensor, keys: Tensor) -> Tensor:
        return self.norm(keys)


class TheCanvasTakesTheEncodersScalars(Plain):
    """both modes multiply by the encoder's layer scalars"""

    def scalar(self, layer: int, causal: bool) -> Tensor:
        return super().scalar(layer, True)


class PicturesAreReadCausally(Plain):
    """the tokens of a picture do not see those that follow them"""

    def sees(self, kind: str, pieces: Pieces, pictures: Sequence[Placed]) -> Tensor:
        return super().sees(kind, pieces, ())


class PicturesAreSeenBothWaysInSlidingLayersOnly(Plain):
    """the tokens of a picture see each other both ways in sliding layers only, as in Gemma 4"""

    def sees(self, kind: str, pieces: Pieces, pictures: Sequence[Placed]) -> Tensor:
        return super().sees(kind, pieces, pictures if kind == SLIDING else ())


def name_of(trap: type[Plain]) -> str:
    """EndTokensFromConfigJson is end_tokens_from_config_json."""
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in trap.__name__).removeprefix("_")


TRAPS: dict[str, type[Plain]] = {name_of(trap): trap for trap in Plain.__subclasses__()}
"""By the name of their case."""
