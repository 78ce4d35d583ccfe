"""A canvas in the making as styled text: each token shows what became of it in the step."""

from collections.abc import Iterable, Iterator
from itertools import groupby

from dgemma.decoding.events import Step
from dgemma.terminal.layout import Piece, Style
from dgemma.text.tokenizer import Tokenizer

SPECIAL = "·"
_CERTAINTY = (Style.RENOISED, Style.CHANGED, Style.ACCEPTED)


class CanvasText:
    """Text of the best canvas, as far as a commit would take it: up to its first end token."""

    def __init__(self, tokenizer: Tokenizer, ends: Iterable[int]):
        self.tokenizer, self.ends = tokenizer, frozenset(ends)

    def kept(self, step: Step) -> list[int]:
        best = step.best.tolist()
        return best[: next((i for i, token in enumerate(best) if token in self.ends), None)]

    def pieces(self, step: Step, before: Step | None) -> list[Piece]:
        """Changed: another best token than the step before; else accepted, or re-noised. Special tokens are dots."""
        kept = self.kept(step)
        accepted = step.accepted.tolist()
        changed = (step.best != before.best).tolist() if before else [False] * len(kept)
        styles = [
            Style.CHANGED if moved else Style.ACCEPTED if taken else Style.RENOISED
            for taken, moved in zip(accepted, changed, strict=False)
        ]
        return list(self._decoded(kept, styles))

    def _decoded(self, tokens: list[int], styles: list[Style]) -> Iterator[Piece]:
        byte_ids = self.tokenizer.byte_ids
        for is_byte, run in groupby(zip(tokens, styles, strict=False), key=lambda pair: pair[0] in byte_ids):
            pairs = list(run)
            if is_byte:  # several bytes are one character, which is no more certain than any of them
                style = min((style for _, style in pairs), key=_CERTAINTY.index)
                yield self.tokenizer.decode([token for token, _ in pairs]), style
                continue
            for token, style in pairs:
                special = token in self.tokenizer.special_ids
                yield (SPECIAL, Style.FAINT) if special else (self.tokenizer.decode([token]), style)
