"""Calls of tools, in the notation that the model writes them in."""

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from dgemma.constraints.nodes import Choice, Node, Repeat, Special, sequence
from dgemma.constraints.schema import CALL, json_schema
from dgemma.text.messages import prepare_tools
from dgemma.text.output import CALL as OPEN
from dgemma.text.output import CALL_END as CLOSE

_NO_ARGUMENTS: Mapping[str, Any] = {"properties": {}}


def tool_calls(tools: Sequence[Mapping[str, Any]], name: str | None = None, many: bool = False) -> Node:
    """One call (`many`: or several, nothing between them) of one of the tools, or of the one that is named.

    A tool is {"type": "function", "function": {"name", "parameters"}}; one without parameters takes no arguments.
    Raises ValueError that names the tool for an unknown name, one that no call can hold, or a schema's trouble.
    """
    return _tool_calls(json.dumps(tools), name, many)


@lru_cache(maxsize=64)
def _tool_calls(tools: str, name: str | None, many: bool) -> Node:
    functions = [tool["function"] for tool in prepare_tools(json.loads(tools))]
    known = [function["name"] for function in functions]
    if name is not None and name not in known:
        raise ValueError(f"there is no tool {name!r}; known are {', '.join(map(repr, known)) or 'none'}")
    if not functions:
        raise ValueError("a call needs at least one tool")
    call = Choice(tuple(_call(function) for function in functions if name in (None, function["name"])))
    return Repeat(call, 1) if many else call


def _call(function: Mapping[str, Any]) -> Node:
    name = function["name"]
    if not re.fullmatch(r"[^\s{}<>|\"]+", name):
        raise ValueError(f"the tool's name {name!r} cannot stand in a call: it holds a blank or one of {{}}<>|\"")
    # Arguments are an object, whatever else the parameters say.
    parameters = function.get("parameters") or _NO_ARGUMENTS
    try:
        arguments = json_schema({**parameters, "type": "object"}, CALL)
    except ValueError as error:
        raise ValueError(f"tool {name!r}: parameters {error}") from None
    return sequence(Special(OPEN), f"call:{name}", arguments, Special(CLOSE))
