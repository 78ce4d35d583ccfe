"""How JSON values are written: as JSON, or as the model writes them in a tool call."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dgemma.constraints import strings
from dgemma.constraints.nodes import EMPTY, Both, Node, Special, choice, optional, sequence, text
from dgemma.text.calls import DEPTH, QUOTE

WHITESPACE = " "
"""In JSON it may stand once behind each comma and colon, and nowhere else."""


@dataclass(frozen=True)
class Notation:
    """The few things in which the notations differ."""

    null: Node
    quote: Node
    blank: Node  # behind ',' and ':'
    characters: Node  # within a string that nothing binds
    spell: Callable[[Node], Node]  # texts to what stands for them within a string
    keys: Callable[[Node], Node]  # texts to keys
    name: Callable[[str], Node]  # one key
    order: Callable[[Iterable[str]], list[str]]  # of an object's keys

    def pair(self, key: Node, value: Node) -> Node:
        return sequence(key, ":", self.blank, value)

    def string(self, texts: Node) -> Node:
        return sequence(self.quote, self.spell(texts), self.quote)

    def literal(self, value: Any, level: int = 0) -> Node:
        """One value; an object's keys in `order`, a number as Python's json writes it."""
        if level > DEPTH:
            raise ValueError(f"a value is nested deeper than {DEPTH}")
        match value:
            case str():
                _check_text(value, self)
                return self.string(text(value))
            case None:
                return self.null
            case bool() | int() | float():
                return text(json.dumps(value))
            case Mapping():
                pairs = (self.pair(self.name(k), self.literal(value[k], level + 1)) for k in self.order(value))
                return sequence("{", self.separated(pairs), "}")
            case list() | tuple():
                return sequence("[", self.separated(self.literal(item, level + 1) for item in value), "]")
        raise ValueError(f"{type(value).__name__} is not a JSON value")

    def separated(self, parts: Iterable[Node]) -> Node:
        comma = sequence(",", self.blank)
        found = [node for part in parts for node in (comma, part)]
        return sequence(*found[1:])


def _check_text(value: str, notation: Notation) -> None:
    if notation is CALL and '<|"' in value:
        raise ValueError(f"the text {value!r} cannot stand in a call: it would end the string")


def _json_keys(texts: Node) -> Node:
    return JSON.string(texts)


def _call_keys(texts: Node) -> Node:
    return Both((texts, strings.BARE_KEYS))


def _json_key(name: str) -> Node:
    return JSON.string(text(name))


def _call_key(name: str) -> Node:
    return text(name) if strings.is_bare(name) else CALL.literal(name)


def _sorted(names: Iterable[str]) -> list[str]:
    return sorted(names, key=str.lower)


JSON: Notation = Notation(
    null=text("null"),
    quote=text('"'),
    blank=optional(WHITESPACE),
    characters=strings.JSON_CHARACTERS,
    spell=strings.spell_json,
    keys=_json_keys,
    name=_json_key,
    order=list,
)
CALL: Notation = Notation(
    null=choice("null", "None"),  # the released templates write None
    quote=Special(QUOTE),
    blank=EMPTY,
    characters=strings.CALL_CHARACTERS,
    spell=strings.spell_call,
    keys=_call_keys,
    name=_call_key,
    order=_sorted,
)
