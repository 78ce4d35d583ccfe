"""The notation of tool calls: `call:name{key:value,…}`.

    value  = string | number | true | false | null | object | list
    string = <|"|> any text <|"|>          object = { key : value , … }          list = [ value , … ]

A string has no escapes: it ends at the next `<|"|>`. A key is bare, or a string. Blanks around punctuation are allowed;
bare words as values are not, since a guess at what they mean is not a call.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dgemma.text.messages import Plain

QUOTE = '<|"|>'
DEPTH = 64  # deeper nesting is noise, and must not exhaust the stack

_NAME = re.compile(r"\s*call:([^\s{}<>|\"]+)\s*")
_KEY = re.compile(r"[^\s{}\[\],:<\"][^{}\[\],:<\"]*")
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?P<fraction>\.\d+)?(?P<exponent>[eE][+-]?\d+)?(?![\w.])", re.ASCII)
_WORD = re.compile(r"(true|false|null|None)(?!\w)")
_WORDS = {"true": True, "false": False, "null": None, "None": None}  # the released templates write null as None
_BLANK = re.compile(r"\s*")


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool: `arguments` are Python values."""

    name: str
    arguments: dict[str, Any]

    @property
    def arguments_json(self) -> str:
        return json.dumps(self.arguments, ensure_ascii=False)


def parse_call(body: str) -> ToolCall:
    """The call between `<|tool_call>` and `<tool_call|>`. Raises ValueError that says what is wrong, and where."""
    name = _NAME.match(body)
    if name is None:
        raise ValueError("'call:' and the name of a function are expected")
    reader = _Reader(body, name.end())
    arguments = reader.mapping(0)
    if reader.at < len(body):
        raise reader.error("the end of the call")
    return ToolCall(name[1], arguments)


def format_value(value: Any, plain: Plain = str) -> str:
    """A JSON value in the notation, as the released templates write it: keys bare and sorted without regard to case.

    `plain` is applied to each text, so that what a tool returns cannot write special tokens (see Tokenizer.plain).
    """
    match value:
        case str():
            return QUOTE + plain(value) + QUOTE
        case bool():
            return "true" if value else "false"
        case Mapping():
            return "{" + format_pairs(value, plain) + "}"
        case list() | tuple():
            return "[" + ",".join(format_value(item, plain) for item in value) + "]"
        case None | int() | float():
            return str(value)
    raise ValueError(f"{type(value).__name__} is not a JSON value")


def format_pairs(values: Mapping[str, Any], plain: Plain = str) -> str:
    """`key:value,…` without the braces."""
    pairs = sorted(values.items(), key=lambda pair: pair[0].lower())
    return ",".join(f"{plain(key)}:{format_value(value, plain)}" for key, value in pairs)


def format_tool_response(name: str, value: Any, plain: Plain = str) -> str:
    """What the host appends after the model's `<|tool_response>`; the same model turn then continues.

    An object is written as its keys, anything else under the key `value`.
    """
    pairs = value if isinstance(value, Mapping) else {"value": value}
    return f"response:{name}{{{format_pairs(pairs, plain)}}}<tool_response|>"


class _Reader:
    """Recursive descent over one call; `at` is the position of the next character, blanks skipped."""

    def __init__(self, text: str, at: int):
        self.text, self.at = text, at

    def error(self, expected: str) -> ValueError:
        found = repr(self.text[self.at : self.at + 12]) if self.at < len(self.text) else "the end"
        return ValueError(f"{expected} is expected at character {self.at}, not {found}")

    def take(self, mark: str) -> bool:
        if not self.text.startswith(mark, self.at):
            return False
        self._to(self.at + len(mark))
        return True

    def mapping(self, depth: int) -> dict[str, Any]:
        if not self.take("{"):
            raise self.error("'{'")
        values: dict[str, Any] = {}
        if self.take("}"):
            return values
        while True:
            key = self.key()
            if key in values:
                raise ValueError(f"the key {key!r} stands twice")
            if not self.take(":"):
                raise self.error("':'")
            values[key] = self.value(depth + 1)
            if self.take("}"):
                return values
            if not self.take(","):
                raise self.error("',' or '}'")

    def sequence(self, depth: int) -> list[Any]:
        values: list[Any] = []
        if not self.take("[") or self.take("]"):
            return values
        while True:
            values.append(self.value(depth + 1))
            if self.take("]"):
                return values
            if not self.take(","):
                raise self.error("',' or ']'")

    def key(self) -> str:
        if self.text.startswith(QUOTE, self.at):
            return self.string()
        key = _KEY.match(self.text, self.at)
        if key is None:
            raise self.error("a key")
        self._to(key.end())
        return key[0].rstrip()

    def value(self, depth: int) -> Any:
        if depth > DEPTH:
            raise ValueError(f"values are nested deeper than {DEPTH}")
        if self.text.startswith(QUOTE, self.at):
            return self.string()
        if self.text.startswith("{", self.at):
            return self.mapping(depth)
        if self.text.startswith("[", self.at):
            return self.sequence(depth)
        if word := _WORD.match(self.text, self.at):
            self._to(word.end())
            return _WORDS[word[1]]
        if number := _NUMBER.match(self.text, self.at):
            self._to(number.end())
            if number["fraction"] is None and number["exponent"] is None:
                return int(number[0])
            if math.isinf(real := float(number[0])):
                raise ValueError(f"the number {number[0]} is out of range")
            return real
        raise self.error("a value")

    def string(self) -> str:
        start = self.at + len(QUOTE)
        end = self.text.find(QUOTE, start)
        if end < 0:
            raise ValueError(f"the string at character {self.at} has no end")
        self._to(end + len(QUOTE))
        return self.text[start:end]

    def _to(self, at: int) -> None:
        blank = _BLANK.match(self.text, at)
        self.at = blank.end() if blank else at
