"""Events as the page sees them: what the canvas holds at each step, before anything is committed."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from dgemma.decoding.events import Block, Prefilled, Step
from dgemma.serve.answers import Answers, Progress
from dgemma.text.tokenizer import StreamDecoder, Tokenizer


class Drafts:
    """Turns the progress of one choice into JSON objects."""

    def __init__(self, answers: Answers, tokenizer: Tokenizer):
        self.answers = answers
        self._token = lru_cache(None)(lambda token: tokenizer.decode([token]))
        self._told = 0  # characters of the raw text that blocks have brought
        self._kept = 0  # tokens of it
        self._bytes = tokenizer.byte_ids
        self._decoder = StreamDecoder(tokenizer)

    def event(self, progress: Progress) -> dict[str, Any]:
        event, text = progress.event, progress.choice.text
        if isinstance(event, Prefilled):
            tokens, cached = event.tokens, event.cached
            return {
                "event": "prefilled",
                "prompt_tokens": tokens + cached,
                "cached_tokens": cached,
                "seconds": event.seconds,
            }
        if isinstance(event, Step):
            return {
                "event": "step",
                "block": event.block,
                "step": event.step,
                "temperature": event.temperature,
                "mean_entropy": event.mean_entropy,
                "still": event.still,
                "tokens": [self._token(token) for token in event.best.tolist()],
                "canvas": [self._token(token) for token in event.canvas.tolist()],
                "entropy": [round(value, 3) for value in event.entropy.tolist()],
                "accepted": event.accepted.int().tolist(),
            }
        if isinstance(event, Block):
            gained, self._told = text.raw[self._told :], len(text.raw)
            ids, self._kept = text.tokens[self._kept :], len(text.tokens)
            return {
                "event": "block",
                "block": event.block,
                "tokens": len(event.tokens),
                "steps": event.steps,
                "converged": event.converged,
                "seconds": event.denoise_seconds,
                "text": gained,
                "ids": ids,
                "texts": self._texts(ids),
            }
        return self.finished(progress)

    def finished(self, progress: Progress) -> dict[str, Any]:
        choice = progress.choice
        whole = {"text": choice.text.whole, "reason": choice.finish_reason}
        return {"event": "finished", **whole, "usage": self.answers.usage()}

    def _texts(self, ids: Sequence[int]) -> list[str]:
        """What each token brings of the text; characters of several bytes stand at the last of them."""
        texts: list[str] = []
        for token in ids:
            if texts and token not in self._bytes:
                texts[-1] += self._decoder.finish()
            texts.append(self._decoder.push([token]))
        return texts
