"""What the model wrote, taken apart: thoughts, answer, tool calls. One machine for streams and for whole texts."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

from dgemma.text.calls import QUOTE, ToolCall, parse_call
from dgemma.text.stops import partial_suffix
from dgemma.text.tokenizer import StreamDecoder, Tokenizer

THOUGHT, THOUGHT_END = "<|channel>", "<channel|>"
CALL, CALL_END = "<|tool_call>", "<tool_call|>"
ENDS = ("<turn|>", "<eos>", "<|tool_response>")
MARKS = (THOUGHT, THOUGHT_END, CALL, CALL_END, QUOTE, *ENDS)

_MARK = re.compile("|".join(map(re.escape, MARKS)))
_HEADER = re.compile(r"thought\b\n?")


@dataclass(frozen=True)
class ReasoningDelta:
    """More text of the thoughts."""

    text: str


@dataclass(frozen=True)
class ContentDelta:
    """More text of the answer. `problem` says why a call stands here verbatim, markers included, as text."""

    text: str
    problem: str | None = None


Increment = ReasoningDelta | ContentDelta | ToolCall


@dataclass(frozen=True)
class ParsedOutput:
    """`complete` is False if the text ends within a thought or a call; each malformed call has a line in `problems`."""

    reasoning: str
    content: str
    tool_calls: list[ToolCall]
    complete: bool
    problems: list[str]


class _State(Enum):
    CONTENT = auto()
    HEADER = auto()  # after `<|channel>`: the word "thought" and a line break, which are no text
    THOUGHT = auto()
    CALL = auto()


class OutputParser:
    """Feed it the decoded output, special tokens included, in pieces of any size.

    Who has the tokens can tell markers from text that spells one out, and passes the latter as `plain`.

    - A thought runs from `<|channel>thought\\n` to `<channel|>`; one that is never closed is reasoning to the end, and
      calls that the model only weighs within a thought are reasoning too.
    - A call that does not parse is content, verbatim, with its problem; what follows it is read as usual.
    - Within a string of a call, other markers are text. If the string has no end, the first of them ends the call.
    - The markers that end a turn are dropped, as is a closer with nothing open.
    """

    def __init__(self) -> None:
        self._state = _State.CONTENT
        self._held = ""  # possible beginning of a marker, or of a thought's header
        self._break = ""  # line break that belongs to `<channel|>` if that comes next
        self._body: list[str] = []  # of the call that is open
        self._quoted = False  # within a string of that call
        self._thought = False  # some reasoning has been given out
        self._parted = False  # … and a later thought is another paragraph
        self._out: list[Increment] = []
        self.complete = True

    def push(self, text: str, plain: bool = False) -> list[Increment]:
        """What is certain by now; neighbours of one kind are joined. plain: nothing in the text is a marker."""
        if plain:
            self._held = self._text(self._held + text)
        else:
            self._feed(text)
        return self._taken()

    def finish(self) -> list[Increment]:
        """The rest, at the end of the output. Sets `complete`."""
        self._flush()
        while self._state is _State.CALL:
            body = "".join(self._body)
            end = next((m for m in _MARK.finditer(body) if m[0] != QUOTE), None) if self._quoted else None
            if end is None:
                self.complete = False
                self._fail(body, "", "the call has no end")
            else:
                closer = CALL_END if end[0] == CALL_END else ""
                self._fail(body[: end.start()], closer, "a string in the call has no end")
                self._feed(body[end.start() + len(closer) :])
                self._flush()
        self.complete = self.complete and self._state is _State.CONTENT
        return self._taken()

    def _flush(self) -> None:
        held, self._held = self._held, ""
        self._text(held)  # a piece of a header is no text

    def _taken(self) -> list[Increment]:
        out, self._out = self._out, []
        return out

    def _feed(self, text: str) -> None:
        text, self._held = self._held + text, ""
        at = 0
        for mark in _MARK.finditer(text):
            self._text(text[at : mark.start()], closed=True)
            self._mark(mark[0])
            at = mark.end()
        cut = max(at, len(text) - partial_suffix(text[at:], MARKS))
        # A header is held whole, in front of what may begin a marker.
        rest = self._text(text[at:cut])
        self._held = rest + text[cut:]

    def _text(self, text: str, closed: bool = False) -> str:
        """Text without markers, in the present state; `closed` if a marker follows. Returns what must still be held."""
        if self._state is _State.HEADER:
            if not closed and "thought\n".startswith(text):
                return text
            header = _HEADER.match(text)
            text = text[header.end() :] if header else text
            self._state = _State.THOUGHT
        if not text:
            return ""
        match self._state:
            case _State.CONTENT:
                self._content(text)
            case _State.CALL:
                self._body.append(text)
            case _State.THOUGHT:
                text = self._break + text
                self._break = "\n" if text.endswith("\n") else ""
                self._reason(text.removesuffix("\n"))
        return ""

    def _mark(self, mark: str) -> None:
        if self._state is _State.CALL:
            self._mark_in_call(mark)
        elif self._state is _State.THOUGHT:
            if mark in (THOUGHT, THOUGHT_END):
                self._break, self._parted = "", self._thought
                self._state = _State.HEADER if mark == THOUGHT else _State.CONTENT
            elif mark not in ENDS:
                self._text(mark)
        elif mark == THOUGHT:
            self._state = _State.HEADER
        elif mark == CALL:
            self._state, self._body, self._quoted = _State.CALL, [], False
        elif mark == QUOTE:
            self._content(mark)

    def _mark_in_call(self, mark: str) -> None:
        if mark == QUOTE:
            self._quoted = not self._quoted
        if mark == QUOTE or self._quoted:
            self._body.append(mark)
            return
        body = "".join(self._body)
        if mark != CALL_END:
            self._fail(body, "", "the call has no end")
            self._mark(mark)
            return
        try:
            call = parse_call(body)
        except ValueError as error:
            self._fail(body, CALL_END, str(error))
        else:
            self._state = _State.CONTENT
            self._out.append(call)

    def _fail(self, body: str, closer: str, problem: str) -> None:
        self._state = _State.CONTENT
        self._out.append(ContentDelta(CALL + body + closer, problem))

    def _content(self, text: str) -> None:
        last = self._out[-1] if self._out else None
        if isinstance(last, ContentDelta) and last.problem is None:
            self._out[-1] = ContentDelta(last.text + text)
        else:
            self._out.append(ContentDelta(text))

    def _reason(self, text: str) -> None:
        if not text:
            return
        if self._parted:
            text, self._parted = "\n\n" + text, False
        self._thought = True
        last = self._out[-1] if self._out else None
        if isinstance(last, ReasoningDelta):
            self._out[-1] = ReasoningDelta(last.text + text)
        else:
            self._out.append(ReasoningDelta(text))


class MarkedDecoder:
    """Tokens into text and markers apart: a marker is its own token, never ordinary ones that spell it out."""

    def __init__(self, tokenizer: Tokenizer):
        self._decoder = StreamDecoder(tokenizer)
        self._marks = {tokenizer.id(mark): mark for mark in MARKS}

    def push(self, token: int) -> tuple[str, str]:
        """The text that is certain by now, and the marker behind it or ""."""
        mark = self._marks.get(token, "")
        return self.finish() if mark else self._decoder.push([token]), mark

    def finish(self) -> str:
        return self._decoder.finish()


def parse(text: str) -> ParsedOutput:
    """The whole output, special tokens included, by the same machine."""
    parser = OutputParser()
    return _parsed(parser, parser.push(text))


def parse_tokens(tokens: Sequence[int], tokenizer: Tokenizer) -> ParsedOutput:
    """The whole output from its tokens."""
    parser, decoder, found = OutputParser(), MarkedDecoder(tokenizer), list[Increment]()
    for token in tokens:
        text, mark = decoder.push(token)
        found += parser.push(text, plain=True) + parser.push(mark)
    return _parsed(parser, found + parser.push(decoder.finish(), plain=True))


def _parsed(parser: OutputParser, increments: list[Increment]) -> ParsedOutput:
    increments = increments + parser.finish()
    contents = [i for i in increments if isinstance(i, ContentDelta)]
    return ParsedOutput(
        reasoning="".join(i.text for i in increments if isinstance(i, ReasoningDelta)),
        content="".join(i.text for i in contents),
        tool_calls=[i for i in increments if isinstance(i, ToolCall)],
        complete=parser.complete,
        problems=[i.problem for i in contents if i.problem is not None],
    )
