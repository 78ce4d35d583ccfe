"""The text of one choice as its tokens are committed; streams and whole answers are made by the same machine."""

from collections.abc import Sequence

from dgemma.text.calls import format_pairs
from dgemma.text.output import (
    CALL,
    CALL_END,
    THOUGHT,
    THOUGHT_END,
    ContentDelta,
    Increment,
    MarkedDecoder,
    OutputParser,
    ReasoningDelta,
    ToolCall,
)
from dgemma.text.stops import StopStrings
from dgemma.text.tokenizer import StreamDecoder, Tokenizer


class ChoiceText:
    """Tokens in; thoughts, answer and calls out. Stop strings are looked for in the answer alone.

    chat: take thoughts and calls apart; otherwise all is answer, without special tokens. calls: whether the client
    offered tools; if not, what looks like a call is answer. ends: tokens that end the text, left out of `raw`.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], ends: Sequence[int], chat: bool, calls: bool):
        self._marked = MarkedDecoder(tokenizer) if chat else None
        self._plain = StreamDecoder(tokenizer, skip_special=True)
        self._parser = OutputParser()
        self._stops = StopStrings(stops)
        self._ends, self._calls, self._thinking = frozenset(ends), calls, False
        self.tokens: list[int] = []
        """Those that count: all, or up to the one that completed a stop string."""
        self.reasoning_tokens = 0
        self.raw = ""
        """Everything as the model wrote it, thoughts and calls included."""
        self.content = self.reasoning = ""
        self.tool_calls: list[ToolCall] = []

    @property
    def stopped(self) -> bool:
        return self._stops.matched is not None

    @property
    def whole(self) -> str:
        """`raw` without the stop string that ended it."""
        return self.raw[: self.raw.rfind(self._stops.matched)] if self._stops.matched else self.raw

    def push(self, tokens: Sequence[int]) -> list[Increment]:
        """What these tokens make certain; after a stop string, nothing."""
        found: list[Increment] = []
        for token in tokens:  # one by one, so that it is known which of them completes a stop string
            if self.stopped:
                break
            self.tokens.append(token)
            text, mark = self._marked.push(token) if self._marked else (self._plain.push([token]), "")
            self._count(mark)
            self.raw += text + ("" if token in self._ends else mark)
            found += self._pass_on(self._parser.push(text, plain=True) + self._parser.push(mark))
        return self._kept(found)

    def finish(self) -> list[Increment]:
        """What was held back, at the end of the tokens."""
        if self.stopped:
            return []
        text = (self._marked or self._plain).finish()
        self.raw += text
        found = self._pass_on(self._parser.push(text, plain=True) + self._parser.finish())
        if not self.stopped and (held := self._stops.finish()):
            found.append(ContentDelta(held))
        return self._kept(found)

    def _count(self, mark: str) -> None:
        self._thinking = self._thinking or mark == THOUGHT
        self.reasoning_tokens += self._thinking
        self._thinking = self._thinking and mark != THOUGHT_END

    def _pass_on(self, increments: Sequence[Increment]) -> list[Increment]:
        passed: list[Increment] = []
        for increment in increments:
            if isinstance(increment, ToolCall) and not self._calls:
                text = f"{CALL}call:{increment.name}{{{format_pairs(increment.arguments)}}}{CALL_END}"
                increment = ContentDelta(text)
            if isinstance(increment, ContentDelta):
                increment = ContentDelta(self._stops.push(increment.text)[0])
            passed.append(increment)
            if self.stopped:
                break
        return passed

    def _kept(self, increments: Sequence[Increment]) -> list[Increment]:
        """Neighbours of one kind joined, and noted."""
        joined: list[Increment] = []
        for increment in increments:
            last = joined[-1] if joined else None
            if isinstance(increment, ToolCall):
                self.tool_calls.append(increment)
                joined.append(increment)
            elif increment.text and isinstance(increment, ContentDelta):
                self.content += increment.text
                before = joined.pop().text if isinstance(last, ContentDelta) else ""  # type: ignore[union-attr]
                joined.append(ContentDelta(before + increment.text))
            elif increment.text:
                self.reasoning += increment.text
                before = joined.pop().text if isinstance(last, ReasoningDelta) else ""  # type: ignore[union-attr]
                joined.append(ReasoningDelta(before + increment.text))
        return joined
