"""What binds one value, brought together from all the schemas that speak of it."""

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any

from dgemma.constraints import regex
from dgemma.constraints.keywords import TYPES, Place, check
from dgemma.constraints.nodes import Node
from dgemma.constraints.numbers import Bound
from dgemma.constraints.strings import FORMATS, NOTES, format_node

DEPTH = 4
"""Times that one reference is followed within itself; what lies deeper is left out."""
LEVELS = 48
"""Levels of a schema, references followed."""
BUDGET = 40_000
"""Characters of names and listed values, references followed; a schema counts as ten of them."""


Places = tuple[Place, ...]


@dataclass(frozen=True)
class Span:
    """From `least` to `most`; None: without end."""

    least: int = 0
    most: int | None = None

    def within(self, least: int | None, most: int | None) -> "Span":
        ends = [end for end in (self.most, most) if end is not None]
        return Span(max(self.least, least or 0), min(ends, default=None))


@dataclass(frozen=True)
class Members:
    """What one schema says of an object's members."""

    place: Place
    properties: Mapping[str, Place] | None
    patterned: tuple[Node, Place] | None
    additional: Place | None

    def of(self, name: str) -> Place | None:
        """What binds a member."""
        return (self.properties or {}).get(name, self.additional)


@dataclass(frozen=True)
class Items:
    """What one schema says of a list's items."""

    prefix: tuple[Place, ...]
    rest: Place | None

    def of(self, at: int) -> Place | None:
        return self.prefix[at] if at < len(self.prefix) else self.rest


@dataclass(frozen=True)
class Options:
    place: Place
    keyword: str
    schemas: Places


@dataclass
class Facts:
    """Everything that binds one value, whichever schemas it comes from."""

    place: Place
    types: frozenset[str] = frozenset(TYPES)
    values: tuple[Any, ...] | None = None
    low: Bound | None = None
    high: Bound | None = None
    texts: tuple[Node, ...] = ()
    length: Span = field(default_factory=Span)
    members: tuple[Members, ...] = ()
    required: tuple[str, ...] = ()
    size: Span = field(default_factory=Span)
    items: tuple[Items, ...] = ()
    count: Span = field(default_factory=Span)
    options: tuple[Options, ...] = ()


class Reader:
    """Gathers facts from a schema's places; what it reads in all is limited."""

    def __init__(self, root: Any):
        self.root = root
        self.left = BUDGET

    def spend(self, cost: int, place: Place) -> None:
        self.left -= cost
        if self.left < 0:
            raise ValueError(f"{place.pointer}: the schema is too large: it passes {BUDGET} characters, 10 a schema")

    def facts(self, places: Places) -> Facts:
        facts = Facts(places[0])
        for place in places:
            facts = self.add(facts, place)
        return facts

    def add(self, facts: Facts, place: Place) -> Facts:
        """The facts and what a schema adds to them, its references and `allOf` included."""
        self.spend(10, place)
        if place.level > LEVELS:
            raise ValueError(f"{place.pointer}: the schema is nested deeper than {LEVELS}, references followed")
        if isinstance(place.schema, bool):
            free = {"array", "object"} if place.free == 0 else set()
            return replace(facts, types=facts.types - free if place.schema else frozenset())
        check(place)
        facts = copy(facts)
        self._add_values(facts, place)
        _add_numbers(facts, place)
        _add_texts(facts, place)
        _add_members(facts, place)
        _add_items(facts, place)
        for keyword in ("anyOf", "oneOf"):
            if keyword in place.schema:
                options = tuple(place.at(keyword, i) for i in range(len(place.schema[keyword])))
                facts.options += (Options(place, keyword, options),)
        for i in range(len(place.schema.get("allOf", ()))):
            facts = self.add(facts, place.at("allOf", i))
        if "$ref" in place.schema:
            found = self._follow(place)
            facts = self.add(facts, found) if found else replace(facts, types=frozenset())
        return facts

    def _add_values(self, facts: Facts, place: Place) -> None:
        schema = place.schema
        null = ["null"] if schema.get("nullable") else []
        if "type" in schema:
            names = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
            facts.types &= frozenset().union(*(TYPES[name] for name in [*names, *null]))
        for values in ([schema["const"]] if "const" in schema else None, schema.get("enum")):
            if values is not None:
                self.spend(len(values), place)
                values = [*values, *([None] if null else [])]
                facts.values = tuple(v for v in values if facts.values is None or any(same(v, w) for w in facts.values))

    def _follow(self, place: Place) -> Place | None:
        """Where a reference leads; None if it has been followed often enough."""
        target = place.schema["$ref"]
        if place.references.count(target) >= DEPTH:
            return None
        if target != "#" and not target.startswith("#/"):
            raise place.error("$ref", f"can only point into the schema itself, as '#/$defs/name', not to {target!r}")
        found = self.root
        for step in target.split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and step.isdecimal():
                found = dict(enumerate(found)).get(int(step))
            else:
                found = found.get(step) if isinstance(found, Mapping) else None
            if found is None:
                raise place.error("$ref", f"points to nothing: {target!r}")
        return Place(found, target, (*place.references, target), place.level + 1)


def same(a: Any, b: Any) -> bool:
    """Equality of JSON values: 1 is 1.0, but true is not 1."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return bool(a == b)


def _add_numbers(facts: Facts, place: Place) -> None:
    schema = place.schema
    for keyword, strict in (("minimum", False), ("exclusiveMinimum", True)):
        if keyword in schema:
            bound = Bound(_decimal(schema[keyword]), strict)
            facts.low = max(filter(None, (facts.low, bound)), key=lambda b: (b.value, b.strict))
    for keyword, strict in (("maximum", False), ("exclusiveMaximum", True)):
        if keyword in schema:
            bound = Bound(_decimal(schema[keyword]), strict)
            facts.high = min(filter(None, (facts.high, bound)), key=lambda b: (b.value, not b.strict))
    if "multipleOf" in schema:
        facts.types -= {"number"}


def _decimal(value: float) -> Decimal:
    return Decimal(value if isinstance(value, int) else repr(value))


def _add_texts(facts: Facts, place: Place) -> None:
    schema = place.schema
    facts.length = facts.length.within(schema.get("minLength"), schema.get("maxLength"))
    if "pattern" in schema:
        facts.texts += (_search(schema["pattern"], place, "pattern"),)
    if "format" in schema and schema["format"] not in NOTES:
        if schema["format"] not in FORMATS:
            raise place.error("format", f"is not supported with {schema['format']!r}; known are {', '.join(FORMATS)}")
        facts.texts += (format_node(schema["format"]),)


def _search(pattern: str, place: Place, keyword: str) -> Node:
    try:
        return regex.search(pattern)
    except ValueError as error:
        raise place.error(keyword, f"with {pattern!r:.60}: {error}") from None


def _add_members(facts: Facts, place: Place) -> None:
    schema = place.schema
    facts.required += tuple(name for name in schema.get("required", ()) if name not in facts.required)
    facts.size = facts.size.within(schema.get("minProperties"), schema.get("maxProperties"))
    if not schema.keys() & {"properties", "patternProperties", "additionalProperties"}:
        return
    properties = (
        {name: place.at("properties", name) for name in schema["properties"]} if "properties" in schema else None
    )
    patterns = schema.get("patternProperties", {})
    if patterns and (properties or len(patterns) > 1 or schema.get("additionalProperties") not in (None, True, False)):
        raise place.error("patternProperties", "is supported with one pattern, and no other properties beside it")
    patterned = [(_search(p, place, "patternProperties"), place.at("patternProperties", p)) for p in patterns]
    additional = place.at("additionalProperties") if "additionalProperties" in schema else None
    facts.members += (Members(place, properties, patterned[0] if patterned else None, additional),)


def _add_items(facts: Facts, place: Place) -> None:
    schema = place.schema
    facts.count = facts.count.within(schema.get("minItems"), schema.get("maxItems"))
    # The older form: a list in `items`, and `additionalItems` for the rest.
    first, rest = ("items", "additionalItems") if isinstance(schema.get("items"), list) else ("prefixItems", "items")
    if first in schema or rest in schema:
        prefix = tuple(place.at(first, i) for i in range(len(schema.get(first, ()))))
        facts.items += (Items(prefix, place.at(rest) if rest in schema else None),)
