"""Calls of declared tools: which one, with which arguments, what its result says, and when none of them fits."""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dgemma.constraints.nodes import Node
from dgemma.constraints.tools import tool_calls
from dgemma.evals.tasks import Answer, Item, Message, Score, words
from dgemma.evals.tasks.extraction import fits, same
from dgemma.evals.tasks.words import Slot

LEVELS: tuple[str, ...] = ("call", "two", "thinking", "answer", "none")

NO_TOOL = "I have no tool for that."
GREETINGS = ("Hello, I am {name}.", "Hi! {name} here.", "Good morning, my name is {name}.", "Hey, this is {name}.")
WELCOME = "Hello, {name}! How can I help?"
CHORES = words.sentence(
    ("Wash my {things}.", "Walk {person}'s dog.", "Can you paint {count} {things}?", "Carry the {things} to {city}."),
    things=words.THING,
    person=words.PERSON,
    count=words.whole(2, 60),
    city=words.CITY,
)


def _room(rng: random.Random) -> tuple[str, str]:
    if rng.random() < 0.3:
        room = rng.choice(words.ROOMS)
        return room, f"the {room}"
    room = f"room {rng.randint(1, 400)}"
    return room, room


ROOM = Slot({"type": "string"}, _room)
MESSAGE = words.sentence(
    ("I am late", "I am in {city}", "we meet at {hour}", "the {things} are here", "I need {count} {things}"),
    city=words.CITY,
    hour=words.HOUR,
    things=words.THING,
    count=words.whole(2, 30),
)
CURRENCY = words.word(("EUR", "USD", "GBP", "JPY", "CHF", "INR", "SEK"))
FOREIGN = words.sentence(
    ("{a}{b}", "{a}{b}{a}"), a=words.word(("la", "mi", "to", "ne", "su")), b=words.word(("ran", "vel", "kor", "dis"))
)


@dataclass(frozen=True)
class Tool:
    """wish: what a user wants of it; asks: questions, whose places are the arguments; reply: what its result means.

    A parameter that stands in every question is required.
    """

    name: str
    description: str
    wish: str
    parameters: Mapping[str, Slot]
    asks: tuple[str, ...]
    results: Mapping[str, Slot]
    reply: str

    @property
    def declaration(self) -> dict[str, Any]:
        required = [name for name in self.parameters if all(name in words.places(ask) for ask in self.asks)]
        properties = {name: slot.schema for name, slot in self.parameters.items()}
        parameters = {"type": "object", "properties": properties, "required": required}
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}


TOOLS = (
    Tool(
        "get_weather",
        "Weather in a city.",
        "the weather",
        {"city": words.CITY, "day": words.DAY},
        (
            "What is the weather in {city}?",
            "How is the weather in {city} on {day}?",
            "Will it rain in {city} on {day}?",
            "Do I need a coat in {city} on {day}?",
            "Weather in {city} for {day}, please.",
        ),
        {"temperature": words.whole(-15, 38), "sky": words.word(words.SKIES)},
        "It is {temperature} degrees and {sky} in {city}.",
    ),
    Tool(
        "get_time",
        "Time in a city.",
        "the time",
        {"city": words.CITY},
        (
            "What time is it in {city}?",
            "How late is it in {city} now?",
            "Tell me the time in {city}.",
            "What does the clock say in {city}?",
            "Time in {city}, please.",
            "Is it night in {city}?",
        ),
        {"time": words.CLOCK},
        "It is {time} in {city}.",
    ),
    Tool(
        "set_timer",
        "Start a timer.",
        "a timer",
        {"minutes": words.whole(1, 180), "label": words.word(words.DISHES)},
        (
            "Set a timer for {minutes} minutes.",
            "Start a timer of {minutes} minutes for the {label}.",
            "Time the {label}: {minutes} minutes.",
            "The {label} need {minutes} minutes, set a timer.",
        ),
        {"ends": words.CLOCK},
        "The timer of {minutes} minutes ends at {ends}.",
    ),
    Tool(
        "send_message",
        "Send a message.",
        "to send a message",
        {"to": words.PERSON, "text": MESSAGE},
        (
            "Tell {to} that {text}.",
            'Send "{text}" to {to}.',
            "Write to {to}: {text}",
            "Let {to} know that {text}.",
            'Message {to} "{text}".',
        ),
        {"sent": words.flag("was", "was not")},
        "Your message to {to} {sent} sent.",
    ),
    Tool(
        "add_event",
        "Add to the calendar.",
        "a calendar entry",
        {"title": words.MEETING, "day": words.DAY, "hour": words.HOUR},
        (
            "Add {title} on {day} at {hour}.",
            "Put {title} in my calendar, {day} at {hour}.",
            "On {day} at {hour} I have {title}. Note it.",
            "Plan {title} for {day}, {hour} o'clock.",
        ),
        {"added": words.flag("is", "is not")},
        "Your event {title} {added} in the calendar for {day} at {hour}.",
    ),
    Tool(
        "convert_currency",
        "Convert money.",
        "to convert money",
        {"amount": words.tenths(1, 900), "source": CURRENCY, "target": CURRENCY},
        (
            "How much is {amount} {source} in {target}?",
            "Convert {amount} {source} to {target}.",
            "What do I get in {target} for {amount} {source}?",
            "Change {amount} {source} into {target}.",
        ),
        {"value": words.tenths(1, 900)},
        "{amount} {source} is {value} {target}.",
    ),
    Tool(
        "play_music",
        "Play a song.",
        "to hear a song",
        {"song": words.TITLE, "device": words.choice(("phone", "radio", "speaker"))},
        (
            'Play "{song}".',
            'Play the song "{song}" on the {device}.',
            'I want to hear "{song}" on my {device}.',
            'Put on "{song}", please.',
        ),
        {"minutes": words.whole(2, 12)},
        'Playing "{song}", {minutes} minutes.',
    ),
    Tool(
        "turn_light",
        "Switch a light.",
        "the light",
        {"room": ROOM, "on": words.flag("on", "off")},
        (
            "Turn {on} the light in {room}.",
            "Light {on} in {room}, please.",
            "Switch the lamp in {room} {on}.",
            "I want the light in {room} {on}.",
        ),
        {"done": words.flag("is now", "could not be turned")},
        "The light in {room} {done} {on}.",
    ),
    Tool(
        "set_heating",
        "Heat a room.",
        "the heating",
        {"room": ROOM, "degrees": words.tenths(15, 26)},
        (
            "Heat {room} to {degrees} degrees.",
            "Set the heating in {room} to {degrees}.",
            "I want {degrees} degrees in {room}.",
            "Make it {degrees} degrees in {room}.",
        ),
        {"now": words.tenths(8, 26)},
        "It is {now} degrees in {room} and will be {degrees}.",
    ),
    Tool(
        "search_books",
        "Find books.",
        "books",
        {"topic": words.THING, "author": words.PERSON, "limit": words.whole(2, 50)},
        (
            "Find {limit} books about {topic}.",
            "Which books about {topic} are by {author}?",
            "Search for books on {topic} by {author}, at most {limit}.",
            "I want to read about {topic}. Show {limit} books.",
        ),
        {"found": words.whole(2, 90), "first": words.TITLE},
        'There are {found} books about {topic}. The first is "{first}".',
    ),
    Tool(
        "order_food",
        "Order a meal.",
        "to order food",
        {"dish": words.word(words.DISHES), "count": words.whole(2, 40), "spicy": words.flag("spicy", "mild")},
        (
            "Order {count} {dish}.",
            "We want to eat {count} {dish}, {spicy} ones.",
            "Get us {count} {spicy} {dish}.",
            "Can we have {count} {dish} to eat? Make them {spicy}.",
        ),
        {"price": words.tenths(9, 300), "minutes": words.whole(10, 90)},
        "Your {count} {dish} cost {price} and come in {minutes} minutes.",
    ),
    Tool(
        "translate",
        "Translate a text.",
        "a translation",
        {"text": MESSAGE, "language": words.choice(("French", "German", "Polish"))},
        (
            'What is "{text}" in {language}?',
            'Translate "{text}" into {language}.',
            'How do I say "{text}" in {language}?',
            'Put "{text}" into {language}.',
        ),
        {"text": FOREIGN},
        'In {language} that is "{text}".',
    ),
    Tool(
        "book_table",
        "Book a table.",
        "a table",
        {"people": words.whole(2, 20), "day": words.DAY, "inside": words.flag("inside", "outside")},
        (
            "Book a table for {people} on {day}.",
            "I need a table {inside} for {people} people on {day}.",
            "On {day} we are {people}. Book a table {inside}.",
            "A table for {people} {inside} on {day}, please.",
        ),
        {"number": words.whole(1, 99)},
        "You have table {number} for {people} on {day}.",
    ),
    Tool(
        "add_to_list",
        "Shopping list.",
        "to note something to buy",
        {"item": words.THING, "count": words.whole(2, 60)},
        (
            "Put {count} {item} on my list.",
            "I have to buy {count} {item}. Note it.",
            "Add {count} {item} to the shopping list.",
            "{count} {item} for the list, please.",
        ),
        {"entries": words.whole(2, 80)},
        "The {item} are on the list. It has {entries} entries.",
    ),
    Tool(
        "find_train",
        "Next train.",
        "a train",
        {"start": words.CITY, "goal": words.CITY},
        (
            "When is the next train from {start} to {goal}?",
            "Find a train from {start} to {goal}.",
            "I have to go from {start} to {goal} by train.",
            "Train to {goal} from {start}, please.",
        ),
        {"leaves": words.CLOCK, "track": words.whole(1, 30)},
        "The train to {goal} leaves at {leaves} from track {track}.",
    ),
)
DECLARATIONS = {tool.name: tool.declaration for tool in TOOLS}


def draw(rng: random.Random, level: str) -> Item:
    if level == "none":
        return _none(rng)
    count = {"call": 1, "two": 2, "answer": 1}.get(level) or rng.randint(1, 2)
    tools = rng.sample(TOOLS, count)
    tool = rng.choice(tools)
    ask = rng.choice(tool.asks)
    arguments, said = words.draw_all(tool.parameters, words.places(ask), rng)
    question = {"role": "user", "content": ask.format(**said)}
    call = {"type": "function", "function": {"name": tool.name, "arguments": arguments}}
    called: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [call]}
    if level == "thinking":
        called["reasoning"] = f"The user wants {tool.wish}. {tool.name} fits."
    if level != "answer":
        return _item((question, called), level, tools)
    result, told = words.draw_all(tool.results, tool.results, rng)
    returned = {"role": "tool", "name": tool.name, "content": json.dumps(result)}
    reply = {"role": "assistant", "content": tool.reply.format(**(said | told))}
    return _item((question, called, returned, reply), level, tools)


def check(item: Item, answer: Answer) -> Score:
    if not item.answer.get("tool_calls"):
        text = answer.text.strip()
        silent = not answer.tool_calls
        return Score(silent and text == item.answer["content"], silent and bool(text))
    wanted = item.answer["tool_calls"][0]["function"]
    right = [call.name == wanted["name"] and same(call.arguments, wanted["arguments"]) for call in answer.tool_calls]
    declared = {tool["function"]["name"]: tool["function"]["parameters"] for tool in item.tools}
    valid = any(call.name in declared and fits(call.arguments, declared[call.name]) for call in answer.tool_calls)
    if item.think:
        return Score(right == [True], valid, {"reasoning": float(answer.reasoning.strip() == item.answer["reasoning"])})
    return Score(right == [True], valid)


def _none(rng: random.Random) -> Item:
    """A greeting, a chore, or a wish whose tool is not declared."""
    missing, *tools = rng.sample(TOOLS, rng.randint(2, 3))
    kind = rng.choice(("greeting", "chore", "missing", "missing"))
    answer = NO_TOOL
    if kind == "greeting":
        name = rng.choice(words.PEOPLE)
        question, answer = rng.choice(GREETINGS).format(name=name), WELCOME.format(name=name)
    elif kind == "chore":
        question = CHORES.draw(rng)[1]
    else:
        ask = rng.choice(missing.asks)
        question = ask.format(**words.draw_all(missing.parameters, words.places(ask), rng)[1])
    return _item(({"role": "user", "content": question}, {"role": "assistant", "content": answer}), "none", tools)


def _item(messages: tuple[Message, ...], level: str, tools: Sequence[Tool]) -> Item:
    return Item(messages, level, tuple(DECLARATIONS[tool.name] for tool in tools), think=level == "thinking")


def constraint(item: Item) -> Node | None:
    """A call, or several, of the declared tools; nothing where the right answer is none."""
    calls = item.answer.get("tool_calls")
    return tool_calls(item.tools, many=len(calls) > 1) if calls else None
