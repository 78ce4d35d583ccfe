"""From what a caller writes to the automaton that a generation keeps to."""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeAlias

from dgemma.constraints import nodes
from dgemma.constraints.automaton import build
from dgemma.constraints.regex import fullmatch
from dgemma.constraints.schema import json_schema
from dgemma.constraints.tokens import lift
from dgemma.decoding.constraint import TokenAutomaton
from dgemma.text.output import THOUGHT, THOUGHT_END
from dgemma.text.tokenizer import Tokenizer

Constraint: TypeAlias = Mapping[str, Any] | str | Sequence[str] | nodes.Node
"""A JSON schema, a regular expression that matches the whole answer, a list of choices, or what `grammar` makes."""


def node_of(constraint: Constraint) -> nodes.Node:
    """Raises ValueError, with the keyword or the place, for what cannot be kept to."""
    match constraint:
        case str():
            return fullmatch(constraint)
        case Mapping():
            return json_schema(constraint)
        case nodes.Chars() | nodes.Special() | nodes.Sequence() | nodes.Choice() | nodes.Repeat() | nodes.Both():
            return constraint
        case Sequence() if constraint and all(isinstance(option, str) and option for option in constraint):
            return nodes.choice(*constraint)
    raise ValueError("a constraint is a JSON schema, a regular expression, a list of texts, or a grammar's node")


def compiled(
    constraint: Constraint, tokenizer: Tokenizer, size: int, ends: tuple[int, ...], pad: int, think: bool = False
) -> TokenAutomaton:
    """The automaton over `size` token ids; the ones asked for last are remembered.

    ends: tokens that end an answer. A thought may come before it: an empty one, or any with `think`, where the
    tokenizer has marks for it. ValueError for what cannot be kept to, or would take too much memory or time.
    """
    return _compiled(_Key.of(constraint), tokenizer, size, ends, pad, think)


class _Key:
    """A constraint that is equal to another of the same content; a node only to itself, since it may be a graph whose
    paths nobody can count.
    """

    def __init__(self, constraint: Constraint, content: Any):
        self.constraint, self.content = constraint, content

    @classmethod
    def of(cls, constraint: Constraint) -> "_Key":
        if not isinstance(constraint, Mapping | str | list | tuple):
            return cls(constraint, id(constraint))
        try:
            return cls(constraint, json.dumps(constraint))
        except (TypeError, ValueError) as error:
            raise ValueError(f"the constraint is not JSON: {error}") from None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.content == other.content

    def __hash__(self) -> int:
        return hash(self.content)


@lru_cache(maxsize=64)
def _compiled(
    key: _Key, tokenizer: Tokenizer, size: int, ends: tuple[int, ...], pad: int, think: bool
) -> TokenAutomaton:
    node = node_of(key.constraint)
    if tokenizer.id(THOUGHT) is not None:
        words = nodes.Repeat(nodes.ANY) if think else nodes.EMPTY
        thought = nodes.sequence(nodes.Special(THOUGHT), "thought\n", words, nodes.Special(THOUGHT_END))
        node = nodes.sequence(nodes.optional(thought), node)
    return lift(build(node), tokenizer, size, ends, pad)
