"""Schemas made into automata, by jsonschema: what is written is valid, and valid values are written."""

import datetime
import ipaddress
import json
import random
import re
import time
import uuid
from functools import cache
from typing import Any

import jsonschema
import pytest
from schemas import schema_of, value_of
from walks import Walker

from dgemma.constraints.automaton import Automaton, build
from dgemma.constraints.schema import CALL, json_schema
from dgemma.constraints.strings import FORMATS
from dgemma.text.calls import parse_call

TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"v": {"type": "integer"}, "next": {"$ref": "#/$defs/node"}},
            "required": ["v"],
            "additionalProperties": False,
        }
    },
}
SHAPES = [
    {"type": "object", "properties": {"kind": {"const": "dot"}, "x": {"type": "integer"}}, "required": ["kind"]},
    {"type": "object", "properties": {"kind": {"const": "box"}, "x": {"type": "string"}}, "required": ["kind"]},
    {"type": ["null", "boolean"]},
]
SCHEMAS: dict[str, Any] = {
    "anything": True,
    "empty": {},
    "null": {"type": "null"},
    "boolean": {"type": "boolean"},
    "integer": {"type": "integer"},
    "number": {"type": "number"},
    "string": {"type": "string"},
    "types": {"type": ["string", "null", "integer"], "minLength": 2, "maximum": 3},
    "untyped": {"minLength": 3, "minItems": 2},
    "enum": {"enum": ["a", 'q"\\\n', None, True, 1.5, -3, [1, {"k": "v"}]]},
    "enum, bound": {"enum": ["a", "abc", 3, 30], "minLength": 2, "maximum": 10},
    "const": {"const": {"a": [1, 2, "é"]}},
    "minimum": {"type": "integer", "minimum": 17},
    "range": {"type": "integer", "minimum": -120, "maximum": 1005},
    "negative": {"type": "integer", "exclusiveMinimum": -1000, "exclusiveMaximum": -99},
    "fraction": {"type": "number", "exclusiveMinimum": -0.125, "maximum": 10.5},
    "above zero": {"type": "number", "exclusiveMinimum": 0},
    "below zero": {"type": "number", "exclusiveMaximum": 0},
    "minus zero": {"type": "number", "minimum": -0.0, "maximum": 0.5},
    "zero": {"type": "number", "minimum": 0, "maximum": 0},
    "integer between fractions": {"type": "integer", "minimum": 0.5, "exclusiveMaximum": 9.5},
    "multiples of one": {"type": "number", "multipleOf": 1, "maximum": 12},
    "length": {"type": "string", "minLength": 2, "maxLength": 4},
    "pattern": {"type": "string", "pattern": r'^[a-c"\\\n\x01é😀]+$'},
    "pattern inside": {"type": "string", "pattern": "ab+", "maxLength": 6},
    "two patterns": {"allOf": [{"pattern": "a"}, {"pattern": "b$"}], "type": "string"},
    "list": {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 3},
    "free list": {"type": "array"},
    "empty list": {"type": "array", "maxItems": 0},
    "tuple": {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "items": False, "minItems": 1},
    "tuple and more": {"prefixItems": [{"type": "null"}], "items": {"type": "boolean"}, "type": "array", "minItems": 3},
    "open tuple": {"type": "array", "prefixItems": [{"type": "null"}]},
    "free object": {"type": "object"},
    "closed object": {"type": "object", "additionalProperties": False},
    "map": {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 1, "maxProperties": 2},
    "optional": {"type": "object", "properties": {k: {"type": "null"} for k in "abcde"}, "additionalProperties": False},
    "at least one": {"type": "object", "properties": {"a": {"type": "null"}, "b": True}, "minProperties": 1},
    "required": {
        "type": "object",
        "properties": {k: {"enum": [1]} for k in "abcdef"},
        "required": ["c", "e"],
        "additionalProperties": False,
    },
    "required, not listed": {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["z"]},
    "others": {
        "type": "object",
        "properties": {"ab": {"type": "integer"}, "ac": {"type": "integer"}},
        "additionalProperties": {"type": "string", "minLength": 1},
    },
    "any others": {"type": "object", "properties": {"": {"type": "integer"}}, "additionalProperties": True},
    "impossible member": {"type": "object", "properties": {"a": False, "b": {"type": "null"}}},
    "patterned": {"type": "object", "patternProperties": {"^x_": {"type": "integer"}}, "additionalProperties": False},
    "any of": {"anyOf": [{"type": "integer"}, {"type": "string", "maxLength": 2}]},
    "any of, required": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
    },
    "one of": {"oneOf": SHAPES},
    "one of, required": {
        "oneOf": [
            {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
            {"type": "object", "properties": {"b": {"type": "integer"}}, "required": ["b"]},
        ]
    },
    "all of": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer", "minimum": 3}}, "required": ["a"]},
            {"type": "object", "properties": {"a": {"maximum": 9}, "b": {"type": "boolean"}}},
        ]
    },
    "all of, closed": {
        "allOf": [
            {"properties": {"a": {"type": "integer"}}, "additionalProperties": False},
            {"properties": {"b": {"type": "integer"}}},
        ],
        "type": "object",
    },
    "reference": {"type": "array", "items": {"$ref": "#/definitions/a~1b"}, "definitions": {"a/b": {"type": "null"}}},
    "reference with more": {"$ref": "#/$defs/s", "maxLength": 3, "$defs": {"s": {"type": "string", "minLength": 2}}},
    "tree": TREE,
    "root": {"type": "array", "items": {"$ref": "#"}, "maxItems": 2},
    "annotations": {"title": "t", "description": "d", "default": 1, "examples": [2], "type": "null", "$comment": "c"},
}


def automaton(schema: Any) -> Automaton:
    return build(json_schema(schema))


@cache
def named(name: str) -> Automaton:
    return automaton(SCHEMAS[name])


def accepts(found: Automaton, text: str) -> bool:
    return found.accepts(text.encode())


def assert_sound(schema: Any, found: Automaton, draws: int, seed: int = 0) -> None:
    walker = Walker(found, seed)
    validator = jsonschema.Draft202012Validator(schema)
    for i in range(draws):
        text = walker.text(steps=i % 50)
        validator.validate(json.loads(text))


@pytest.mark.parametrize("name", SCHEMAS)
def test_written_is_valid(name: str) -> None:
    assert_sound(SCHEMAS[name], named(name), 40)


@pytest.mark.parametrize("seed", range(100))
def test_written_is_valid_under_random_schemas(seed: int) -> None:
    schema = schema_of(random.Random(seed), 2)
    assert_sound(schema, automaton(schema), 10, seed)


def plain(value: Any) -> Any:
    """A number that is whole as an integer, as integers are written."""
    match value:
        case float() if value.is_integer():
            return int(value)
        case list():
            return [plain(item) for item in value]
        case dict():
            return {key: plain(item) for key, item in value.items()}
    return value


def assert_complete(schema: Any, found: Automaton, draws: int, seed: int = 0) -> int:
    """Valid values in the order of the properties are written; returns how many were valid."""
    rng = random.Random(seed)
    validator = jsonschema.Draft202012Validator(schema)
    values = [plain(value_of(rng, schema, schema)) for _ in range(draws)]
    valid = [value for value in values if validator.is_valid(value)]
    for value in valid:
        for text in (
            json.dumps(value, ensure_ascii=False, separators=(",", ":")),
            json.dumps(value, ensure_ascii=False),
        ):
            assert accepts(found, text), (schema, text)
    return len(valid)


@pytest.mark.parametrize("name", sorted(SCHEMAS.keys() - {"open tuple"}))
def test_valid_is_written(name: str) -> None:
    assert assert_complete(SCHEMAS[name], named(name), 50) > 3


def test_valid_is_written_under_random_schemas() -> None:
    schemas = [schema_of(random.Random(seed), 2) for seed in range(100)]
    assert sum(assert_complete(schema, automaton(schema), 10, seed) for seed, schema in enumerate(schemas)) > 500


@pytest.mark.parametrize("seed", range(40))
def test_numbers_between_bounds(seed: int) -> None:
    """Against comparison: every decimal near the bounds is written if and only if it lies between them."""
    rng = random.Random(seed)
    places = rng.randint(0, 3)
    low = round(rng.uniform(-30, 30), places)
    high = low + round(rng.uniform(0, 40), places)
    low_key, high_key = rng.choice(["minimum", "exclusiveMinimum"]), rng.choice(["maximum", "exclusiveMaximum"])
    schema = {"type": "number", low_key: low, high_key: high, "$comment": "bounds"}
    try:
        found = automaton(schema)
    except ValueError:
        assert low == high
        assert {low_key, high_key} != {"minimum", "maximum"}
        return
    validator = jsonschema.Draft202012Validator(schema)
    for bound in (low, high, 0, rng.uniform(low, high)):
        for near in (bound, bound - 1, bound + 1, bound + 0.1, bound - 0.001, bound + 0.0001, bound * 10, -bound):
            text = f"{near:.5f}".rstrip("0").rstrip(".")
            assert accepts(found, text) == validator.is_valid(json.loads(text)), (schema, text)


def test_integers_between_bounds() -> None:
    found = automaton({"type": "integer", "minimum": -37, "maximum": 1203})
    assert [n for n in range(-2000, 12050) if accepts(found, str(n))] == list(range(-37, 1204))
    assert not any(accepts(found, text) for text in ("-0", "01", "1.0", "+1", "-", ""))


def test_numbers_of_many_digits() -> None:
    found = automaton({"type": "number"})
    assert accepts(found, "-123456789012345")
    assert not accepts(found, "1234567890123456")
    assert accepts(found, "0.12345678901234")
    assert not accepts(found, "1.123456789012345")
    assert not accepts(found, "1e5")
    assert not accepts(found, ".5")
    assert not accepts(found, "1.")
    assert accepts(automaton({"type": "integer", "minimum": 0, "maximum": 2**63 - 1}), "999999999999999")
    with pytest.raises(ValueError, match="nothing can match"):
        automaton({"type": "integer", "minimum": 10**15})


def test_bounds_finer_and_larger_than_what_is_written() -> None:
    found = automaton({"type": "number", "exclusiveMinimum": 1e-300, "maximum": 10**5000})
    assert accepts(found, "0.00000000000001")
    assert accepts(found, "999999999999999")
    assert not accepts(found, "0")


def test_escapes_in_strings() -> None:
    free, bound = automaton({"type": "string"}), automaton({"type": "string", "maxLength": 1})
    for text in ('"é"', '"😀"', r'"\n"', r'"\""', r'"\\"', r'"\u0001"', '"\x7f"', '""', '"/"'):
        assert [accepts(free, text), accepts(bound, text)] == [True, True], text
    for text in (r'"\u00e9"', r'"\ud83d\ude00"', r'"\/"', '"ab"'):
        assert [accepts(free, text), accepts(bound, text)] == [True, False], text
    for text in ('"\n"', r'"\ud83d"', r'"\ude00"', r'"\x"', '"', '"""', r'"\"'):
        assert [accepts(free, text), accepts(bound, text)] == [False, False], text


def test_one_blank_behind_commas_and_colons() -> None:
    found = automaton({"type": "object", "properties": {"a": {"type": "array", "items": {"const": 1}}, "b": {}}})
    assert accepts(found, '{"a": [1, 1], "b": {"x": [2, 3]}}')
    assert accepts(found, '{"a":[1,1],"b":2}')
    for text in ('{ "a":[]}', '{"a" :[]}', '{"a":  []}', '{"a":[1 ,1]}', '{"a":[]}\n'):
        assert not accepts(found, text)


def test_members_keep_their_order_and_commas() -> None:
    found = automaton(SCHEMAS["required"])
    names = "abcdef"
    for mask in range(64):
        chosen = [name for i, name in enumerate(names) if mask >> i & 1]
        text = json.dumps(dict.fromkeys(chosen, 1), separators=(",", ":"))
        assert accepts(found, text) == ({"c", "e"} <= set(chosen)), text
    assert not accepts(found, '{"e":1,"c":1}')
    assert not accepts(found, '{"c":1,"e":1,}')
    assert not accepts(automaton(SCHEMAS["any others"]), '{"":"x"}'), "a listed member is not written as another one"


def test_references_go_a_few_rounds_deep() -> None:
    found = automaton(TREE)
    text = '{"v":1}'
    for depth in range(1, 7):
        assert accepts(found, text) == (depth <= 4), depth
        text = '{"v":1,"next":' + text + "}"
    with pytest.raises(ValueError, match="nothing can match"):
        automaton({"$ref": "#"})


def test_any_object() -> None:
    found = build(json_schema({"type": "object"}))
    assert accepts(found, '{"a":{"b":[{"c":[]}]}}'.replace("[]", "1"))
    assert accepts(found, "{}")
    assert not accepts(found, "[]")
    assert not accepts(found, '"{}"')
    walker = Walker(found)
    assert all(isinstance(json.loads(walker.text(80)), dict) for _ in range(20))


def test_older_lists_and_nullable() -> None:
    schema = {"type": "array", "items": [{"type": "null"}], "additionalItems": {"type": "integer"}}
    walker = Walker(automaton(schema))
    for _ in range(50):
        jsonschema.Draft7Validator(schema).validate(json.loads(walker.text()))
    assert accepts(walker.automaton, "[null,1,2]")
    nullable = automaton({"type": "string", "nullable": True, "enum": ["a"]})
    assert accepts(nullable, "null")
    assert accepts(nullable, '"a"')
    assert not accepts(nullable, '"b"')


FORMAT_CHECKS = {
    "date": datetime.date.fromisoformat,
    "time": datetime.time.fromisoformat,
    "date-time": datetime.datetime.fromisoformat,
    "email": lambda text: re.fullmatch(r"[^@\s]+@[^@\s]+\.[^@\s.]+", text) or 1 / 0,
    "hostname": lambda text: re.fullmatch(r"(?!-)[A-Za-z0-9.-]+(?<!-)", text) or 1 / 0,
    "uuid": uuid.UUID,
    "ipv4": ipaddress.IPv4Address,
    "uri": lambda text: re.fullmatch(r"https?://[^\s/?#]+[^\s]*", text) or 1 / 0,
}
EXAMPLES = {
    "date": ("2024-02-29", "2023-02-29"),
    "time": ("23:59:59.25+02:00", "24:00:00Z"),
    "date-time": ("1999-12-31T00:00:00Z", "1999-12-31 00:00:00Z"),
    "email": ("a.b+c@mail.example.org", "a@b"),
    "hostname": ("a-b.example", "-a.example"),
    "uuid": ("123e4567-e89b-12d3-a456-426614174000", "123e4567e89b12d3a456426614174000"),
    "ipv4": ("192.168.0.255", "192.168.0.256"),
    "uri": ("https://example.org:8080/a%20b/?q=1&r#top", "example.org/a b"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name: str) -> None:
    walker = Walker(automaton({"type": "string", "format": name}))
    for i in range(200):
        FORMAT_CHECKS[name](json.loads(walker.text(steps=i % 40)))
    good, bad = EXAMPLES[name]
    assert accepts(walker.automaton, f'"{good}"')
    assert not accepts(walker.automaton, f'"{bad}"')


def test_days_of_months() -> None:
    found = automaton({"type": "string", "format": "date"})
    day, end = datetime.date(1896, 1, 1), datetime.date(2105, 1, 1)
    assert not any(accepts(found, f'"{year}-02-29"') for year in (1900, 2023, 2100))
    while day < end:
        assert accepts(found, f'"{day}"')
        day += datetime.timedelta(days=1 if day.month == 2 and day.day > 26 else 9)


@pytest.mark.parametrize("schema", [s for n, s in SCHEMAS.items() if n not in ("tree", "root")], ids=str)
def test_call_notation_is_read_back(schema: Any) -> None:
    wrapped = {"type": "object", "properties": {"x": schema}, "required": ["x"]}
    if "definitions" in str(schema) or "$defs" in str(schema):
        wrapped |= {key: schema[key] for key in ("definitions", "$defs") if key in schema}
    walker = Walker(build(json_schema(wrapped, CALL)))
    validator = jsonschema.Draft202012Validator(wrapped)
    for i in range(10):
        try:
            call = parse_call("call:f" + walker.text(steps=i))
        except ValueError as error:
            if "stands twice" not in str(error):  # which no expression can forbid
                raise
        else:
            validator.validate(call.arguments)


REFUSED = [
    ({"properties": {"a": {"uniqueItems": True}}}, "#/properties/a: keyword 'uniqueItems' is not supported"),
    ({"type": "array", "items": {"not": {}}}, "#/items: keyword 'not' is not supported"),
    ({"if": {}}, "#: keyword 'if' is not supported"),
    ({"type": "object", "properties": {"a/b~": {"contains": 1}}}, "#/properties/a~1b~0: keyword 'contains'"),
    ({"dependentRequired": {}}, "#: keyword 'dependentRequired'"),
    ({"type": "object", "propertyNames": {}}, "#: keyword 'propertyNames'"),
    ({"unevaluatedProperties": False}, "#: keyword 'unevaluatedProperties'"),
    ({"$dynamicRef": "#x"}, "#: keyword '$dynamicRef'"),
    ({"type": "integer", "multipleOf": 5}, "#: keyword 'multipleOf' is not supported, other than 1"),
    ({"type": "string", "format": "iri"}, "#: keyword 'format' is not supported with 'iri'"),
    ({"type": "string", "pattern": r"(a)\1"}, "#: keyword 'pattern'"),
    ({"type": "string", "pattern": "("}, "#: keyword 'pattern'"),
    ({"$ref": "other.json"}, "#: keyword '$ref' can only point into the schema itself"),
    ({"$ref": "#/$defs/x"}, "#: keyword '$ref' points to nothing: '#/$defs/x'"),
    ({"anyOf": [{"$ref": "#/$defs/x"}], "$defs": {"x": {"type": "text"}}}, "#/$defs/x: keyword 'type' holds a type"),
    ({"type": "string", "minLength": -1}, "#: keyword 'minLength' holds a count, not -1"),
    ({"type": "integer", "exclusiveMinimum": True}, "#: keyword 'exclusiveMinimum' holds a number"),
    ({"allOf": [{}, {"required": "a"}]}, "#/allOf/1: keyword 'required' holds a list of names"),
    ({"properties": {"a": 3}}, "#/properties/a: a schema is an object, true or false, not 3"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "#: keyword 'oneOf' is supported with options told apart"),
    ({"oneOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]}, "#: keyword 'oneOf'"),
    ({"type": "object", "minProperties": 2}, "#: keyword 'minProperties'"),
    ({"type": "object", "properties": {"a": {}, "b": {}}, "maxProperties": 1}, "#: keyword 'maxProperties'"),
    (
        {"type": "object", "properties": {"a": {}}, "patternProperties": {"b": {}}},
        "#: keyword 'patternProperties' is supported with one pattern",
    ),
    ([], "#: a schema is an object, true or false"),
]


@pytest.mark.parametrize(("schema", "message"), REFUSED)
def test_refusals_name_keyword_and_place(schema: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        json_schema(schema)


def listed(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


def doubling(rounds: int) -> dict[str, Any]:
    pair = {f"d{i}": {"properties": {k: {"$ref": f"#/$defs/d{i + 1}"} for k in "ab"}} for i in range(rounds)}
    return {"$ref": "#/$defs/d0", "$defs": {**pair, f"d{rounds}": {"type": "null"}}}


@pytest.mark.parametrize(
    "schema",
    [
        nested(5000),
        {"const": listed(100)},
        {"enum": [listed(5000)]},
        doubling(30),
        {"type": "object", "properties": {f"property{i}": {"type": "string"} for i in range(10_000)}},
        {"enum": ["x" * 1000] * 1000},
        {"type": "object", "properties": {"x" * 100_000: {}}},
        {"allOf": [{"anyOf": [{"minLength": i}, {"maxLength": i}]} for i in range(40)]},
        {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}] * 40}}},
    ],
    ids=["nested", "deep", "deeper", "doubling", "members", "values", "name", "alternatives", "loops"],
)
def test_schemas_too_large_end_early(schema: Any) -> None:
    start = time.monotonic()
    with pytest.raises(ValueError, match="#"):
        json_schema(schema)
    assert time.monotonic() - start < 5
