"""What questions are made of: lists of words, and slots, which draw a JSON value and the words for it."""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from string import Formatter
from typing import Any

Schema = Mapping[str, Any]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


PEOPLE = _words(
    "Ada Alan Alma Amir Anna Arno Bea Ben Boris Bruno Carl Clara Dana Dario David Dora Edgar Elena Elif Emil Emma Erik "
    "Eva Fatma Felix Finn Frida Gita Greta Hanna Hugo Ida Igor Ines Ivan Jana Jonas Jun Karim Kira Klara Lars Lea Leo "
    "Lina Lucas Maja Marco Marta Max Mei Mia Milan Mona Nadia Nils Nina Nora Olga Omar Oscar Paula Pavel Petra Rafi "
    "Ravi Rita Rosa Ruth Samir Sara Selma Simon Sofia Stella Sven Tara Theo Tilda Tom Uma Vera Viktor Wanda Yara Yusuf "
    "Zoe"
)
CITIES = _words(
    "Accra Algiers Amman Ankara Athens Baku Bali Basel Beirut Bergen Berlin Bern Bogota Bonn Boston Brno Cairo Cali "
    "Cardiff Chicago Cork Dakar Dallas Delhi Denver Doha Dover Dresden Dublin Essen Geneva Genoa Ghent Graz Hamburg "
    "Hanoi Havana Helsinki Izmir Jakarta Kabul Kazan Kiel Kyoto Lagos Leeds Leipzig Lima Linz Lisbon London Lyon "
    "Madrid Malmo Manila Miami Milan Minsk Munich Nairobi Naples Nice Odessa Osaka Oslo Ottawa Oxford Paris Perth "
    "Porto Prague Quito Riga Rome Sofia Split Tampere Tokyo Toledo Tunis Turin Utrecht Vienna Warsaw York Zagreb "
    "Zurich"
)
THINGS = _words(
    "apples bags balls bananas baskets beans books bottles boxes bricks candles caps carrots chairs cherries coats "
    "coins cups eggs figs flags forks gloves grapes hats jars kites knives lamps lemons limes maps melons mugs nails "
    "nuts olives onions peaches pears peas pencils pens pillows plates plums pots ropes rugs shirts shoes socks spoons "
    "stamps tents tiles tomatoes towels toys"
)
DISHES = _words("burgers curries dumplings noodles omelettes pancakes pizzas salads soups stews tacos wraps")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
JOBS = _words("baker carpenter chemist cook dentist doctor driver farmer gardener lawyer nurse painter pilot")
PETS = ("cat", "dog", "rabbit", "parrot")
SKIES = ("clear", "cloudy", "foggy", "rainy", "snowy", "stormy", "sunny", "windy")
ROOMS = _words("attic bathroom bedroom cellar garage hall kitchen library office pantry studio workshop")
STREETS = _words("Bridge Church Field Forest Garden Harbour Hill King Lake Mill Park River School Station")
ADJECTIVES = _words(
    "bright broken calm cold dark distant early empty golden green hidden late little long lost new old quiet red "
    "silent silver slow small strange warm white wild"
)
NOUNS = _words(
    "bird boat bridge castle clock cloud dream field fire forest garden ghost harbour house island key lake letter "
    "moon morning mountain night ocean river road secret shadow star stone storm summer train tree valley voice "
    "winter"
)


@dataclass(frozen=True)
class Slot:
    """schema: the JSON schema of the values; draw: gives a value and the words that say it."""

    schema: Schema
    draw: Callable[[random.Random], tuple[Any, str]]


@cache
def places(template: str) -> tuple[str, ...]:
    """The names of the `{places}` of a template, in their order."""
    return tuple(name for _, name, _, _ in Formatter().parse(template) if name)


def draw_all(
    slots: Mapping[str, Slot], names: Iterable[str], rng: random.Random
) -> tuple[dict[str, Any], dict[str, str]]:
    """Values and words for some of the slots, by name; no two have the same words."""
    values: dict[str, Any] = {}
    said: dict[str, str] = {}
    for name in names:
        value, text = slots[name].draw(rng)
        while text in said.values():
            value, text = slots[name].draw(rng)
        values[name], said[name] = value, text
    return values, said


def object_schema(properties: Mapping[str, Schema]) -> dict[str, Any]:
    """The schema of objects that hold all these properties and no others."""
    required = list(properties)
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def word(words: Sequence[str]) -> Slot:
    return Slot({"type": "string"}, lambda rng: (rng.choice(words),) * 2)


def choice(words: Sequence[str]) -> Slot:
    """A word out of a few, all of which the schema names."""
    return Slot({"type": "string", "enum": list(words)}, word(words).draw)


def sentence(templates: Sequence[str], **slots: Slot) -> Slot:
    """A text made from one of the templates."""

    def draw(rng: random.Random) -> tuple[Any, str]:
        template = rng.choice(templates)
        text = template.format(**draw_all(slots, places(template), rng)[1])
        return text, text

    return Slot({"type": "string"}, draw)


def whole(low: int, high: int) -> Slot:
    def draw(rng: random.Random) -> tuple[Any, str]:
        value = rng.randint(low, high)
        return value, str(value)

    return Slot({"type": "integer"}, draw)


def tenths(low: int, high: int) -> Slot:
    """A number with one decimal that is not 0."""

    def draw(rng: random.Random) -> tuple[Any, str]:
        value = (10 * rng.randint(low, high - 1) + rng.randint(1, 9)) / 10
        return value, str(value)

    return Slot({"type": "number"}, draw)


def flag(yes: str, no: str) -> Slot:
    said = ((True, yes), (False, no))
    return Slot({"type": "boolean"}, lambda rng: rng.choice(said))


def several(words: Sequence[str], low: int, high: int) -> Slot:
    """A list of different words, said as `a, b and c`."""

    def draw(rng: random.Random) -> tuple[Any, str]:
        values = rng.sample(words, rng.randint(low, high))
        return values, f"{', '.join(values[:-1])} and {values[-1]}"

    return Slot({"type": "array", "items": {"type": "string"}}, draw)


def record(template: str, slots: Mapping[str, Slot]) -> Slot:
    """An object with one property for each slot."""

    def draw(rng: random.Random) -> tuple[Any, str]:
        values, said = draw_all(slots, slots, rng)
        return values, template.format(**said)

    return Slot(object_schema({name: slot.schema for name, slot in slots.items()}), draw)


def records(template: str, slots: Mapping[str, Slot], low: int, high: int) -> Slot:
    """A list of objects, said one after the other."""
    one = record(template, slots)

    def draw(rng: random.Random) -> tuple[Any, str]:
        drawn = [one.draw(rng) for _ in range(rng.randint(low, high))]
        return [value for value, _ in drawn], ", ".join(said for _, said in drawn)

    return Slot({"type": "array", "items": one.schema}, draw)


PERSON = word(PEOPLE)
CITY = word(CITIES)
THING = word(THINGS)
DAY = word(DAYS)
HOUR = whole(7, 21)
CLOCK = sentence(("{hour}:{minute}",), hour=whole(10, 23), minute=whole(10, 59))
TITLE = sentence(
    ("The {adjective} {noun}", "The {noun} of {city}"), adjective=word(ADJECTIVES), noun=word(NOUNS), city=CITY
)
MEETING = sentence(
    ("lunch with {person}", "{person}'s party", "trip to {city}", "call with {person}", "walk with {person}"),
    person=PERSON,
    city=CITY,
)
