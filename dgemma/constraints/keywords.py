"""The keywords of JSON Schema: which are known, and what they hold."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

DEPTH_FREE = 4
"""Levels of lists and objects where a schema allows any value."""
TYPES = {
    "null": {"null"},
    "boolean": {"boolean"},
    "integer": {"integer"},
    "number": {"integer", "number"},
    "string": {"string"},
    "array": {"array"},
    "object": {"object"},
}
ANNOTATIONS = frozenset({
    "title", "description", "default", "example", "examples", "$schema", "$id", "$comment", "$defs", "definitions",
    "deprecated", "readOnly", "writeOnly", "contentMediaType", "contentEncoding", "discriminator", "xml",
    "externalDocs",
})  # fmt: skip
_COUNT, _NUMBER, _SCHEMA, _SCHEMAS, _NAMED, _FLAG, _TEXT = (
    "a count", "a number", "a schema", "a list of schemas", "schemas by name", "true or false", "a text",
)  # fmt: skip
KEYWORDS = {
    "$ref": _TEXT, "type": "a type or a list of types", "enum": "a list of values", "const": "a value",
    "nullable": _FLAG, "minimum": _NUMBER, "maximum": _NUMBER, "exclusiveMinimum": _NUMBER,
    "exclusiveMaximum": _NUMBER, "multipleOf": _NUMBER, "minLength": _COUNT, "maxLength": _COUNT, "pattern": _TEXT,
    "format": _TEXT, "properties": _NAMED, "patternProperties": _NAMED, "additionalProperties": _SCHEMA,
    "required": "a list of names", "minProperties": _COUNT, "maxProperties": _COUNT,
    "items": "a schema or a list of schemas", "additionalItems": _SCHEMA, "prefixItems": _SCHEMAS, "minItems": _COUNT,
    "maxItems": _COUNT, "uniqueItems": _FLAG, "anyOf": _SCHEMAS, "oneOf": _SCHEMAS, "allOf": _SCHEMAS,
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """A schema, where it stands, the references that led there, and how many levels are left if it allows anything."""

    schema: Any
    pointer: str = "#"
    references: tuple[str, ...] = ()
    level: int = 0
    free: int = DEPTH_FREE

    def at(self, *steps: str | int) -> "Place":
        schema, pointer = self.schema, self.pointer
        for step in steps:
            schema = schema[step]
            pointer += "/" + str(step).replace("~", "~0").replace("/", "~1")
        return Place(schema, pointer, self.references, self.level + 1)

    def error(self, keyword: str, problem: str) -> ValueError:
        return ValueError(f"{self.pointer}: keyword {keyword!r} {problem}")


def check(place: Place) -> None:
    """Raises ValueError for a keyword that is not known, or does not hold what it should."""
    if not isinstance(place.schema, Mapping):
        raise ValueError(f"{place.pointer}: a schema is an object, true or false, not {place.schema!r:.60}")
    for keyword, value in place.schema.items():
        if keyword in ANNOTATIONS:
            continue
        if keyword not in KEYWORDS:
            raise place.error(keyword, "is not supported")
        if not _holds(KEYWORDS[keyword], value):
            raise place.error(keyword, f"holds {KEYWORDS[keyword]}, not {value!r:.60}")
    if place.schema.get("uniqueItems"):
        raise place.error("uniqueItems", "is not supported")
    if place.schema.get("multipleOf", 1) != 1:
        raise place.error("multipleOf", "is not supported, other than 1")


def _holds(kind: str, value: Any) -> bool:
    schema = isinstance(value, Mapping | bool)
    match kind:
        case "a count":
            return isinstance(value, int) and not isinstance(value, bool) and value >= 0
        case "a number":
            return isfinite(value) if isinstance(value, float) else type(value) is int
        case "a text":
            return isinstance(value, str)
        case "true or false":
            return isinstance(value, bool)
        case "a schema":
            return schema
        case "a list of schemas":
            return isinstance(value, list) and bool(value)
        case "a schema or a list of schemas":
            return schema or isinstance(value, list)
        case "schemas by name":
            return isinstance(value, Mapping)
        case "a list of values":
            return isinstance(value, list)
        case "a list of names":
            return isinstance(value, list) and all(isinstance(name, str) for name in value)
        case "a type or a list of types":
            names = value if isinstance(value, list) and value else [value]
            return all(isinstance(name, str) and name in TYPES for name in names)
    return True
