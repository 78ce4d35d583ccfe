"""Random schemas of supported keywords, and random values of schemas."""

import random
from typing import Any

NAMES = ["a", "B", "c_d", "e f", 'g"']


def _chance(rng: random.Random, schema: dict[str, Any], **keywords: Any) -> dict[str, Any]:
    return {**schema, **{key: value for key, value in keywords.items() if rng.random() < 0.5}}


def number(rng: random.Random) -> dict[str, Any]:
    low = rng.choice([rng.randint(-120, 120), round(rng.uniform(-20, 20), rng.randint(0, 4)), rng.randint(-(10**9), 0)])
    high = low + rng.choice([0, 1, 7, 12.25, 1000, 10**6])
    keys = [rng.choice(["minimum", "exclusiveMinimum"]), rng.choice(["maximum", "exclusiveMaximum"])]
    kind = rng.choice(["integer", "number"])
    if kind == "integer" or keys != ["minimum", "maximum"]:
        high += 2  # so that there is something between them
    return _chance(rng, {"type": kind}, **dict(zip(keys, (low, high), strict=True)))


def string(rng: random.Random) -> dict[str, Any]:
    if rng.random() < 0.3:
        return {"type": "string", "pattern": rng.choice([r"^[a-z]{2,4}$", r"\d+", r'^"\\n', "^(ä|€|😀)+$", "^[^a]*$"])}
    least = rng.randint(0, 3)
    return _chance(rng, {"type": "string"}, minLength=least, maxLength=least + rng.randint(0, 5))


def array(rng: random.Random, depth: int) -> dict[str, Any]:
    least = rng.randint(0, 2)
    schema = _chance(rng, {"type": "array"}, minItems=least, maxItems=least + rng.randint(0, 3))
    if rng.random() < 0.4:
        schema["prefixItems"] = [schema_of(rng, depth - 1) for _ in range(rng.randint(1, 2))]
        schema["maxItems"] = least + 3
    return {**schema, "items": schema_of(rng, depth - 1)}


def object_(rng: random.Random, depth: int) -> dict[str, Any]:
    names = [name for name in NAMES if rng.random() < 0.5]
    if not names:
        return {"type": "object", "additionalProperties": schema_of(rng, depth - 1)}
    return {
        "type": "object",
        "properties": {name: schema_of(rng, depth - 1) for name in names},
        "required": [name for name in names if rng.random() < 0.4],
        "additionalProperties": rng.choice([False, False, schema_of(rng, 0)]),
    }


def schema_of(rng: random.Random, depth: int) -> dict[str, Any]:
    """A schema that something satisfies, nested at most `depth` deep."""
    kind = rng.randrange(10 if depth > 0 else 6)
    match kind:
        case 0 | 1:
            return number(rng)
        case 2 | 3:
            return string(rng)
        case 4:
            return {"enum": rng.sample(["x", "y\n", 1, 2.5, None, True, [1, "z"], {"q": 0}], rng.randint(1, 4))}
        case 5:
            return {"type": rng.sample(["null", "boolean", "integer"], rng.randint(1, 3))}
        case 6 | 7:
            return object_(rng, depth)
        case 8:
            return array(rng, depth)
    return {"anyOf": [schema_of(rng, depth - 1) for _ in range(2)]}


TEXTS = [
    "",
    "a",
    "ab",
    "abb",
    "xyz",
    "7",
    "a1",
    "é",
    "€😀",
    'q"',
    '"\n',
    "\\/",
    "b\x01",
    "\x7f",
    "abcdefgh",
    "x_1",
    "<|",
]


def value_of(rng: random.Random, schema: Any, root: Any, depth: int = 3) -> Any:
    """A value that is likely to be valid, of what the schema speaks of; whether it is must be checked."""
    if isinstance(schema, bool):
        schema = {}
    if "$ref" in schema:
        found = root
        for step in schema["$ref"].split("/")[1:]:
            found = found[step.replace("~1", "/")]
        return value_of(rng, found, root, depth - 1)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return rng.choice(schema["enum"])
    for keyword in ("anyOf", "oneOf", "allOf"):
        if keyword in schema:
            rest = {key: value for key, value in schema.items() if key != keyword}
            return value_of(rng, {**rest, **rng.choice(schema[keyword])}, root, depth)
    kinds = schema.get("type") or ["null", "boolean", "integer", "number", "string", "array", "object"]
    match kinds if isinstance(kinds, str) else rng.choice(kinds):
        case "null":
            return None
        case "boolean":
            return rng.random() < 0.5
        case "integer" | "number" as kind:
            low = schema.get("minimum", schema.get("exclusiveMinimum", schema.get("maximum", 900) - 1000))
            high = schema.get("maximum", schema.get("exclusiveMaximum", low + 1000))
            whole = kind == "integer" or "multipleOf" in schema
            return rng.choice([low, high, round(rng.uniform(low, high), 0 if whole else rng.randint(0, 5))])
        case "string":
            return rng.choice(TEXTS)
        case "array":
            least, most = schema.get("minItems", 0), schema.get("maxItems", schema.get("minItems", 0) + 3)
            items = [*schema.get("prefixItems", []), *[schema.get("items", True)] * most]
            count = rng.randint(least, most) if depth > 0 else 0
            return [value_of(rng, item, root, depth - 1) for item in items[:count]]
    properties = dict(schema.get("properties", {}))
    if "properties" not in schema or schema.get("additionalProperties"):
        properties |= {rng.choice(TEXTS): schema.get("additionalProperties", True)}
    needed = schema.get("required", [])
    properties = {**properties, **{name: True for name in needed if name not in properties}}
    chosen = [name for name in properties if name in needed or (depth > 0 and rng.random() < 0.5)]
    return {name: value_of(rng, properties[name], root, depth - 1) for name in chosen}
