"""Fields that say what an answer must match, and which of its tokens are known."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from dgemma.constraints.compile import Constraint
from dgemma.constraints.grammar import grammar
from dgemma.serve.body import Body, Object, Text

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


@dataclass(frozen=True)
class Structure:
    """A constraint, made when there is time for it, and the field that asks for it."""

    field: str
    make: Callable[[], Constraint]


class JsonSchema(Body):
    name: str = Field(pattern=r"^[\w-]{1,64}$")
    description: str | None = None
    schema_: Object = Field(alias="schema", description="what it has of keywords is kept to, or refused by name")
    strict: bool | None = Field(None, description="without effect: answers always match")


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to the type 'json_schema', which needs it")
        return self

    @property
    def structure(self) -> Structure | None:
        if self.json_schema:
            schema = self.json_schema.schema_
            return Structure("response_format.json_schema.schema", lambda: schema)
        return Structure("response_format", lambda: ANY_OBJECT) if self.type == "json_object" else None


def _schema(value: Any) -> Any:
    """vLLM takes a schema's text too."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None


class StructuredOutputs(Body):
    """vLLM's name for what the answer must match; exactly one of the fields."""

    json_: Annotated[Object, BeforeValidator(_schema)] | None = Field(None, alias="json", description="a JSON schema")
    regex: Text | None = Field(None, description="an expression that matches the whole answer")
    choice: Annotated[list[Annotated[Text, Field(min_length=1)]], Field(min_length=1)] | None = None
    grammar: Text | None = Field(None, description="in Lark's notation, from its rule `start`")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if len(self.model_fields_set) != 1 or self.structure is None:
            raise ValueError("exactly one of json, regex, choice and grammar must be given")
        return self

    @property
    def structure(self) -> Structure | None:
        if self.grammar is not None:
            return Structure("structured_outputs.grammar", partial(grammar, self.grammar))
        for name, value in (("json", self.json_), ("regex", self.regex), ("choice", self.choice)):
            if value is not None:
                return Structure(f"structured_outputs.{name}", partial(_same, value))
        return None


def _same(value: Any) -> Any:
    return value


class Function(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: Function


ToolChoice = Literal["auto", "none", "required"] | NamedTool


def _pins(value: Any) -> dict[int, int]:
    """From {"3": 17} or [[3, 17]]."""
    pairs = list(value.items()) if isinstance(value, dict) else value
    if not isinstance(pairs, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise ValueError("an object of tokens by position is expected, or a list of [position, token]")
    found: dict[int, int] = {}
    for place, token in pairs:
        if isinstance(place, str) and place.isascii() and place.isdigit() and len(place) < 10:
            place = int(place)
        if type(place) is not int or type(token) is not int or not (0 <= place < 1 << 31 and 0 <= token < 1 << 31):
            raise ValueError(f"position {place!r} and token {token!r} must be whole numbers of at least 0")
        if place in found:
            raise ValueError(f"position {place} is pinned twice")
        found[place] = token
    return found


_BY_POSITION = {"type": "object", "patternProperties": {r"^\d{1,9}$": {"type": "integer", "minimum": 0}}}
_PAIR = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 2, "maxItems": 2}
Pins = Annotated[
    dict[int, int],
    BeforeValidator(_pins),
    WithJsonSchema({"anyOf": [_BY_POSITION, {"type": "array", "items": _PAIR}]}),
]
Tokens = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(min_length=1)]
