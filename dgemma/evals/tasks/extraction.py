"""From a sentence to JSON: the fields that are asked for, in that order, null for what the sentence does not say."""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dgemma.evals.tasks import Answer, Item, Score, words
from dgemma.evals.tasks.words import Schema, Slot

LEVELS: tuple[str, ...] = ("flat", "types", "list", "nested", "schema")

ASKS = (
    "Extract {fields} as JSON: {text}",
    "{text} Give me {fields} as JSON.",
    "Read: {text}\nWrite JSON with {fields}.",
    "Make JSON with {fields} from this: {text}",
    "What are {fields} here? JSON only. {text}",
    "{text}\nJSON of {fields}, please.",
)
SCHEMA_ASKS = (
    "Extract JSON by this schema: {fields}\n{text}",
    "{text}\nAnswer in this schema: {fields}",
    "Schema: {fields}\nText: {text}",
    "Fill this schema from the text. {fields} {text}",
)
OR_NULL = "Use null for what is missing. "


@dataclass(frozen=True)
class Domain:
    """slots: the fields that may be asked for; texts: sentences, each saying some of them."""

    slots: Mapping[str, Slot]
    texts: tuple[str, ...]


PLAIN = (
    Domain(
        {
            "name": words.PERSON,
            "age": words.whole(4, 99),
            "city": words.CITY,
            "job": words.word(words.JOBS),
            "married": words.flag("is married", "is single"),
        },
        (
            "{name} is {age} years old and lives in {city}.",
            "{name}, a {job} from {city}, is {age}.",
            "{name} {married} and works as a {job} in {city}.",
            "At {age}, {name} {married} and a {job}.",
        ),
    ),
    Domain(
        {
            "item": words.THING,
            "quantity": words.whole(2, 99),
            "price": words.tenths(1, 60),
            "size": words.choice(("small", "large")),
            "paid": words.flag("paid", "not paid"),
        },
        (
            "{quantity} {size} {item} for {price}, {paid}.",
            "I ordered {quantity} {item} at {price} each.",
            "The order of {quantity} {size} {item} is {paid}.",
            "For {price} you get {quantity} {item}.",
        ),
    ),
    Domain(
        {
            "title": words.MEETING,
            "day": words.DAY,
            "hour": words.HOUR,
            "city": words.CITY,
            "free": words.flag("free", "not free"),
        },
        (
            "On {day} at {hour} there is a {title} in {city}.",
            "The {title} on {day} is {free}.",
            "Do not forget: {title}, {day}, {hour} o'clock.",
            "In {city} at {hour}: {title}, {free}.",
        ),
    ),
    Domain(
        {
            "title": words.TITLE,
            "author": words.PERSON,
            "pages": words.whole(40, 900),
            "price": words.tenths(3, 50),
            "read": words.flag("have read", "have not read"),
        },
        (
            '"{title}" by {author} has {pages} pages.',
            'I {read} "{title}" by {author}.',
            '{author} wrote "{title}". It costs {price} and has {pages} pages.',
            'The {pages} pages of "{title}" cost {price}.',
        ),
    ),
    Domain(
        {
            "name": words.PERSON,
            "owner": words.PERSON,
            "kind": words.choice(words.PETS),
            "age": words.whole(1, 15),
            "weight": words.tenths(1, 40),
            "tame": words.flag("tame", "not tame"),
        },
        (
            "{name} is a {kind} of {age} years and belongs to {owner}.",
            "The {kind} {name} weighs {weight} kilos and is {tame}.",
            "{owner} has a {kind} called {name}, {age} years old.",
            "My {kind} {name} is {age}, {tame}, and weighs {weight} kilos.",
        ),
    ),
    Domain(
        {
            "flight": words.sentence(
                ("{line} {number}",), line=words.word(("AX", "BK", "QT", "ZN")), number=words.whole(100, 999)
            ),
            "from": words.CITY,
            "to": words.CITY,
            "hour": words.HOUR,
            "late": words.flag("late", "on time"),
        },
        (
            "Flight {flight} from {from} to {to} leaves at {hour}.",
            "{flight} to {to} is {late}.",
            "At {hour} we fly from {from} to {to}.",
            "The plane {flight} from {from} is {late} and lands in {to}.",
        ),
    ),
    Domain(
        {
            "city": words.CITY,
            "rooms": words.whole(1, 9),
            "rent": words.whole(200, 2400),
            "street": words.word(words.STREETS),
            "garden": words.flag("with a garden", "without a garden"),
        },
        (
            "A flat in {city} with {rooms} rooms for {rent} a month.",
            "{rooms} rooms in {street} Road, {city}, {garden}.",
            "The house in {street} Road costs {rent} and has {rooms} rooms.",
            "To let: {rooms} rooms {garden}, {rent} a month, in {city}.",
        ),
    ),
    Domain(
        {
            "runner": words.PERSON,
            "distance": words.tenths(1, 42),
            "minutes": words.whole(5, 240),
            "place": words.whole(1, 60),
            "won": words.flag("won", "did not win"),
        },
        (
            "{runner} ran {distance} km in {minutes} minutes.",
            "After {minutes} minutes {runner} came in at place {place}.",
            "{runner} {won} the race over {distance} km in {minutes} minutes.",
            "Place {place}: {runner}, {minutes} minutes for {distance} km.",
        ),
    ),
)
LISTS = (
    Domain(
        {"name": words.PERSON, "likes": words.several(words.THINGS, 2, 4), "age": words.whole(4, 99)},
        ("{name}, {age}, likes {likes}.", "{likes} are what {name} likes.", "At {age}, {name} collects {likes}."),
    ),
    Domain(
        {"day": words.DAY, "guests": words.several(words.PEOPLE, 2, 4), "city": words.CITY},
        ("On {day} {guests} come to {city}.", "{guests} meet in {city}.", "The guests on {day} are {guests}."),
    ),
    Domain(
        {"driver": words.PERSON, "stops": words.several(words.CITIES, 2, 5), "km": words.whole(50, 3000)},
        ("{driver} drives {km} km by {stops}.", "Stops: {stops}. Driver: {driver}.", "It is {km} km by {stops}."),
    ),
    Domain(
        {"shop": words.CITY, "sells": words.several(words.THINGS, 2, 4), "open": words.flag("open", "closed")},
        ("The shop in {shop} is {open} and sells {sells}.", "Buy {sells} in {shop}; it is {open}."),
    ),
)
NESTED = (
    Domain(
        {
            "name": words.PERSON,
            "age": words.whole(4, 99),
            "address": words.record(
                "{number} {street} Road in {city}",
                {"street": words.word(words.STREETS), "number": words.whole(1, 200), "city": words.CITY},
            ),
        },
        ("{name} is {age} and lives at {address}.", "Send it to {name}, {address}.", "{name}, {age}, {address}."),
    ),
    Domain(
        {
            "day": words.DAY,
            "start": words.record("{city} at {hour}", {"city": words.CITY, "hour": words.HOUR}),
            "end": words.record("{city} at {hour}", {"city": words.CITY, "hour": words.HOUR}),
        },
        (
            "The train leaves {start} and reaches {end}.",
            "On {day} from {start} to {end}.",
            "{day}: {start}, then {end}.",
        ),
    ),
    Domain(
        {
            "people": words.records(
                "{name} is {age} and from {city}",
                {"name": words.PERSON, "age": words.whole(4, 99), "city": words.CITY},
                2,
                5,
            ),
        },
        ("{people}.", "In the group, {people}.", "Here is who came: {people}."),
    ),
    Domain(
        {
            "buyer": words.PERSON,
            "order": words.records("{count} {item}", {"item": words.THING, "count": words.whole(2, 99)}, 2, 5),
        },
        ("{buyer} wants {order}.", "Please send {order} to {buyer}.", "Order of {buyer}: {order}."),
    ),
)
DOMAINS = {"flat": PLAIN, "types": PLAIN, "list": LISTS, "nested": NESTED, "schema": PLAIN + LISTS}


def draw(rng: random.Random, level: str) -> Item:
    domain = rng.choice(DOMAINS[level])
    text = rng.choice(domain.texts)
    values, said = words.draw_all(domain.slots, words.places(text), rng)
    fields = _fields(domain, list(values), level, rng)
    if level == "types":
        properties: dict[str, Schema] = {name: _or_null(domain.slots[name].schema) for name in fields}
    else:
        properties = {name: domain.slots[name].schema for name in fields}
    if level == "schema":
        given = json.dumps({"type": "object", "properties": properties}, separators=(",", ":"))
        question = rng.choice(SCHEMA_ASKS).format(fields=given, text=text.format(**said))
    else:
        names = [_described(name, domain.slots[name].schema) for name in fields]
        joined = ", ".join(names[:-1]) + " and " + names[-1] if names[1:] else names[0]
        question = rng.choice(ASKS).format(fields=joined, text=text.format(**said))
    if level == "types":
        question = OR_NULL + question
    answer = json.dumps({name: values.get(name) for name in fields})
    messages = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    return Item(messages, level, facts={"schema": words.object_schema(properties)})


def check(item: Item, answer: Answer) -> Score:
    try:
        value = json.loads(answer.text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return Score(exact=False, valid=False)
    return Score(same(value, json.loads(item.answer["content"])), fits(value, item.facts["schema"]))


def constraint(item: Item) -> Schema:
    """What the question asks for, as `LanguageModel.generate` takes it."""
    return item.facts["schema"]


def same(a: Any, b: Any) -> bool:
    """Whether two JSON values are equal in type and value (1, 1.0 and true differ), keys in any order."""
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def fits(value: Any, schema: Schema) -> bool:
    """Whether a JSON value keeps a schema of type, enum, properties, required, additionalProperties and items.

    Stricter than the standard in one point: 1.0 is no integer.
    """
    if "type" in schema:
        kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        integral = _kind(value) == "integer" and "number" in kinds
        if _kind(value) not in kinds and not integral:
            return False
    if "enum" in schema and not any(same(value, allowed) for allowed in schema["enum"]):
        return False
    if isinstance(value, list):
        return all(fits(one, schema.get("items", {})) for one in value)
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        known = schema.get("additionalProperties") is not False or value.keys() <= properties.keys()
        complete = value.keys() >= set(schema.get("required", ()))
        return known and complete and all(fits(one, properties.get(name, {})) for name, one in value.items())
    return True


def _fields(domain: Domain, told: Sequence[str], level: str, rng: random.Random) -> list[str]:
    """Which fields are asked for, in which order."""
    kinds = {name: slot.schema["type"] for name, slot in domain.slots.items()}
    if level == "flat":
        simple = [name for name in told if kinds[name] in ("string", "integer")]
        return rng.sample(simple, rng.randint(2, min(4, len(simple))))
    if level == "types":
        special = rng.choice([name for name in kinds if name not in told or kinds[name] in ("number", "boolean")])
    elif level == "schema":
        return rng.sample(told, rng.randint(2, min(4, len(told))))
    else:
        special = rng.choice([name for name in told if kinds[name] in ("array", "object")])
        kinds = {name: kinds[name] for name in told}
    others = [name for name in kinds if name != special]
    fields = [special, *rng.sample(others, rng.randint(min(1, len(others)), min(4, len(others))))]
    rng.shuffle(fields)
    return fields


def _described(name: str, schema: Schema) -> str:
    """A field as a user names it: `likes (list)`, `address (street, city)`."""
    if schema["type"] == "object":
        return f"{name} ({', '.join(schema['properties'])})"
    if schema["type"] == "array":
        inner = schema["items"].get("properties")
        return f"{name} (list of {', '.join(inner)})" if inner else f"{name} (list)"
    return name


def _or_null(schema: Schema) -> Schema:
    allowed = {"enum": [*schema["enum"], None]} if "enum" in schema else {}
    return {**schema, "type": [schema["type"], "null"], **allowed}


def _kind(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
        case dict():
            return "object"
    raise ValueError(f"{type(value).__name__} is not a JSON value")


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
