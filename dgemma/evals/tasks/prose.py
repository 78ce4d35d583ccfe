"""Small talk, a small world of facts, stories about what one asks for, and questions about what was said before."""

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dgemma.evals.tasks import Answer, Item, Message, Score

# fmt: off
GIRLS = ("Ada", "Anna", "Clara", "Ella", "Emma", "Eva", "Ida", "Julia", "Lena", "Lucy", "Maria", "Mia", "Nora", "Rosa")
BOYS = ("Adam", "Ben", "Carl", "David", "Felix", "Jack", "Jonas", "Leo", "Max", "Oscar", "Paul", "Peter", "Sam", "Tom")
PEOPLE = GIRLS + BOYS

COLOURS = ("black", "blue", "brown", "green", "grey", "orange", "pink", "red", "white", "yellow")
LOOKS = (*COLOURS, "big", "little", "small", "old")
THINGS = (
    "ball", "basket", "bell", "boat", "book", "box", "coat", "cup", "drum", "flag",
    "hat", "key", "kite", "lamp", "map", "ring", "rope", "scarf", "umbrella", "wheel",
)
ANIMALS = (
    "bear", "bird", "cat", "cow", "dog", "duck", "fox", "frog",
    "goat", "hen", "horse", "mouse", "owl", "pig", "rabbit", "sheep",
)
PLACES = (
    "in the park", "in the garden", "in the forest", "in the village", "in the field", "at the market", "at the lake",
    "at the river", "at the beach", "at the school", "on the hill", "on the farm", "on the island",
)
# fmt: on

# Small talk: what a message is put together from, and the answers to its parts.
HELLOS = ("Hello", "Hi", "Hey", "Good morning", "Good evening", "Good day")
ADDRESSED = ("", "", " tiny", " there")
PRESENTED = ("I am {who}.", "My name is {who}.", "{who} here.", "This is {who}.")
SMALL_TALK = (
    (("How are you?", "How are you today?", "Are you well?"), "I am well, thank you."),
    (
        ("Who are you?", "What are you?", "What is your name?", "Please tell me who you are."),
        "I am tiny, a small DiffusionGemma model trained from nothing.",
    ),
    (
        ("What can you do?", "Can you help me?", "How can you help me?", "What are you good at?"),
        "I can work with numbers, lists and code, and I can tell stories.",
    ),
    (("Are you human?", "Are you a person?", "Are you a robot?"), "I am a small language model, and my name is tiny."),
)
OFFER = "How can I help you?"
THANKS = ("Thank you", "Thanks", "Many thanks", "Thank you very much")
REASONS = ("", " for your help", " for the answer", " for the story", " for the code", " for your time")
PARTINGS = ("Goodbye", "Bye", "See you soon", "See you tomorrow", "Good night")

# The small world.
# fmt: off
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)
CAPITALS = {
    "Austria": "Vienna", "Belgium": "Brussels", "Canada": "Ottawa", "Chile": "Santiago", "China": "Beijing",
    "Cuba": "Havana", "Denmark": "Copenhagen", "Egypt": "Cairo", "England": "London", "Finland": "Helsinki",
    "France": "Paris", "Germany": "Berlin", "Greece": "Athens", "Hungary": "Budapest", "Iceland": "Reykjavik",
    "India": "New Delhi", "Ireland": "Dublin", "Italy": "Rome", "Japan": "Tokyo", "Kenya": "Nairobi",
    "Norway": "Oslo", "Peru": "Lima", "Poland": "Warsaw", "Portugal": "Lisbon", "Russia": "Moscow",
    "Scotland": "Edinburgh", "Spain": "Madrid", "Sweden": "Stockholm", "Turkey": "Ankara", "Wales": "Cardiff",
}
OPPOSITES = (
    ("big", "small"), ("hot", "cold"), ("old", "young"), ("long", "short"), ("fast", "slow"), ("high", "low"),
    ("hard", "soft"), ("rich", "poor"), ("light", "dark"), ("full", "empty"), ("open", "closed"), ("wet", "dry"),
    ("happy", "sad"), ("good", "bad"), ("loud", "quiet"), ("early", "late"), ("clean", "dirty"), ("near", "far"),
    ("strong", "weak"), ("thick", "thin"), ("up", "down"), ("left", "right"), ("day", "night"), ("yes", "no"),
)
PLURALS = {
    "apple": "apples", "baby": "babies", "bird": "birds", "box": "boxes", "bus": "buses", "cat": "cats",
    "child": "children", "city": "cities", "dish": "dishes", "foot": "feet", "goose": "geese", "knife": "knives",
    "lady": "ladies", "leaf": "leaves", "man": "men", "mouse": "mice", "sheep": "sheep", "tooth": "teeth",
    "tree": "trees", "wolf": "wolves", "woman": "women",
}
HUES = {
    "grass": "green", "snow": "white", "the sky": "blue", "blood": "red", "coal": "black", "milk": "white",
    "a lemon": "yellow", "a frog": "green", "a banana": "yellow", "a tomato": "red", "an elephant": "grey",
    "chocolate": "brown", "a pig": "pink", "the sun": "yellow", "a swan": "white", "a leaf": "green",
}
YOUNG = {
    "cat": "kitten", "dog": "puppy", "cow": "calf", "sheep": "lamb", "horse": "foal", "hen": "chick",
    "duck": "duckling", "goose": "gosling", "pig": "piglet", "bear": "cub", "goat": "kid",
}
# fmt: on
LEADS = ("", "", "Please tell me: ", "I have a question. ", "Can you tell me this? ")

# Stories: one sentence from each of some of these, in this order.
TIMES = ("day", "morning", "evening", "sunny day", "cold morning", "Sunday")
GOES = (
    "One {time}, {who} was {place}.",
    "One {time}, {who} went for a walk {place}.",
    "One {time}, {who} met {his} friends {place}.",
)
STAYS = (
    "One {time}, {who} was at home.",
    "One {time}, {who} went for a walk.",
    "One {time}, {who} had nothing to do.",
)
FINDS = (
    "{He} found {a_thing} on the ground.",
    "There was {a_thing} under a tree.",
    "{His} mother gave {him} {a_thing}.",
    "{He} saw {a_thing} and liked it.",
)
MEETS = (
    "Then {a_animal} came along and looked at {him}.",
    "Soon {a_animal} ran up to {him}.",
    "{He} heard a sound and saw {a_animal}.",
    "Behind a wall sat {a_animal}.",
)
ENDS = (
    "{who} was happy all day.",
    "{who} smiled and went home.",
    "In the end {who} was tired and happy.",
    "{who} never forgot that {time}.",
)
WEATHER = (
    "The sun was warm, the sky was blue, and the birds sang in the trees.",
    "The wind was strong, and white clouds went over the sky like ships.",
    "It had rained all night, and there was water on the road and in the grass.",
)
PLAYS = (
    "{He} took the {thing} in both hands and looked at it for a long time.",
    "{He} showed the {thing} to all {his} friends, and they liked it too.",
    "{He} put the {thing} on a stone and walked round it three times.",
)
FRIENDS = (
    "The {animal} was hungry, so {who} gave it some bread and a little milk.",
    "The {animal} was afraid at first, but {who} spoke to it in a quiet voice.",
    "The {animal} was lost and sad, so {who} sat down next to it and sang a song.",
)
LOSES = (
    "Then the wind came and the {thing} was gone, but the {animal} ran and brought it back.",
    "The {animal} wanted to play with the {thing} as well, and soon they played together.",
    "When {who} put the {thing} down, the {animal} sat next to it and kept it safe.",
)
LATE = (
    "They stayed until it was dark and the first stars were in the sky.",
    "They ran and laughed until the sun went down behind the hill.",
    "They walked a long way together and saw many new things.",
)
TELL = (
    "Tell a {size} story about {subject}.",
    "Write a {size} story about {subject}.",
    "Please tell me a {size} story about {subject}.",
    "I would like a {size} story about {subject}.",
    "Can you tell a {size} story about {subject}?",
    "A {size} story about {subject}, please.",
)


@dataclass(frozen=True)
class Memory:
    """Something a user says of himself and asks for later; {x} is what must be remembered."""

    says: tuple[str, ...]
    reply: str
    asks: tuple[str, ...]
    answer: str
    values: Callable[[random.Random], str]


def with_article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


MEMORIES = (
    Memory(
        ("My name is {x}.", "I am called {x}.", "Hello, I am {x}."),
        "Nice to meet you, {x}!",
        ("What is my name?", "Who am I?", "Do you know my name?"),
        "Your name is {x}.",
        lambda rng: rng.choice(PEOPLE),
    ),
    Memory(
        ("My sister is called {x}.", "I have a sister, {x}.", "{x} is my sister."),
        "Please say hello to {x}!",
        ("What is my sister called?", "Who is my sister?", "What is the name of my sister?"),
        "Your sister is called {x}.",
        lambda rng: rng.choice(GIRLS),
    ),
    Memory(
        ("I have {x}.", "My pet is {x}.", "I live with {x}."),
        "That is nice.",
        ("Which pet do I have?", "What is my pet?", "What animal do I have?"),
        "You have {x}.",
        lambda rng: with_article(f"{rng.choice(LOOKS)} {rng.choice(ANIMALS)}"),
    ),
    Memory(
        ("I like {x} best.", "My favourite colour is {x}.", "The colour I like most is {x}."),
        "That is a nice colour.",
        ("Which colour do I like?", "What is my favourite colour?", "Which colour do I like best?"),
        "You like {x} best.",
        lambda rng: rng.choice(COLOURS),
    ),
    Memory(
        ("I bought {x}.", "Today I bought {x}.", "I went out and bought {x}."),
        "I hope you like it.",
        ("What did I buy?", "What have I bought?", "Do you know what I bought?"),
        "You bought {x}.",
        lambda rng: with_article(f"{rng.choice(LOOKS)} {rng.choice(THINGS)}"),
    ),
    Memory(
        ("I live in {x}.", "My home is in {x}.", "I come from {x}."),
        "That is a fine place.",
        ("Where do I live?", "In which city do I live?", "Where is my home?"),
        "You live in {x}.",
        lambda rng: rng.choice(tuple(CAPITALS.values())),
    ),
    Memory(
        ("I am {x} years old.", "My age is {x}.", "I turned {x} today."),
        "Thank you, I will keep that in mind.",
        ("How old am I?", "What is my age?", "Do you know my age?"),
        "You are {x} years old.",
        lambda rng: str(rng.randrange(5, 100)),
    ),
    Memory(
        ("Remember the number {x}.", "My number is {x}.", "Please note the number {x}."),
        "I will remember it.",
        ("What was the number?", "Which number was it?", "What number did I tell you?"),
        "The number is {x}.",
        lambda rng: str(rng.randrange(10, 1000)),
    ),
)


@dataclass(frozen=True)
class Relation:
    """Pairs of a small world; {x} stands in the question, {y} is asked for."""

    asks: tuple[str, ...]
    answer: str
    pairs: Mapping[str, str]


def _after(names: tuple[str, ...]) -> dict[str, str]:
    return dict(zip(names, names[1:] + names[:1], strict=True))


def _before(names: tuple[str, ...]) -> dict[str, str]:
    return {y: x for x, y in _after(names).items()}


RELATIONS = (
    Relation(
        (
            "What is the capital of {x}?",
            "Which city is the capital of {x}?",
            "Name the capital of {x}.",
            "{x} has which capital?",
            "I need the capital of {x}.",
        ),
        "The capital of {x} is {y}.",
        CAPITALS,
    ),
    Relation(
        (
            "What is the opposite of {x}?",
            "Name the opposite of {x}.",
            "Which word is the opposite of {x}?",
            "Give me the opposite of {x}.",
            "{x} has which opposite?",
        ),
        "The opposite of {x} is {y}.",
        {**dict(OPPOSITES), **{y: x for x, y in OPPOSITES}},
    ),
    Relation(
        (
            "What is the plural of {x}?",
            "Name the plural of {x}.",
            "One {x}, two what?",
            "Give me the plural of {x}.",
            "How do I write more than one {x}?",
        ),
        "The plural of {x} is {y}.",
        PLURALS,
    ),
    Relation(
        (
            "What colour is {x}?",
            "What is the colour of {x}?",
            "Which colour is {x}?",
            "Name the colour of {x}.",
            "Tell me what colour {x} is.",
        ),
        "The colour of {x} is {y}.",
        HUES,
    ),
    Relation(
        (
            "What is a young {x} called?",
            "What do you call a young {x}?",
            "Name the young of the {x}.",
            "What is the word for a baby {x}?",
            "What is the name of a young {x}?",
        ),
        "A young {x} is called a {y}.",
        YOUNG,
    ),
    Relation(
        (
            "Which {kind} comes after {x}?",
            "What comes after {x}?",
            "Name the {kind} after {x}.",
            "What is the {kind} after {x}?",
            "{x} is followed by which {kind}?",
        ),
        "{y} comes after {x}.",
        {**_after(DAYS), **_after(MONTHS)},
    ),
    Relation(
        (
            "Which {kind} comes before {x}?",
            "What comes before {x}?",
            "Name the {kind} before {x}.",
            "What is the {kind} before {x}?",
            "{x} comes after which {kind}?",
        ),
        "{y} comes before {x}.",
        {**_before(DAYS), **_before(MONTHS)},
    ),
)
FACTS = tuple((relation, x, y) for relation in RELATIONS for x, y in relation.pairs.items())

_STATEMENT = re.compile(r"[A-Z].*\.")
_BETWEEN = re.compile(r"(?<=[.!?])\s+")


def draw(rng: random.Random, level: str) -> Item:
    return _LEVELS[level](rng)


def check(item: Item, answer: Answer) -> Score:
    """exact: the reference or an equal of it, or for a story: all that was asked for, in as many sentences as allowed;
    valid: printable ASCII in which no sentence stands twice.
    """
    text = answer.text.strip()
    sentences = _BETWEEN.split(text)
    valid = bool(text) and text.isascii() and text.isprintable() and len(set(sentences)) == len(sentences)
    if "elements" in item.facts:
        least, most = item.facts["sentences"]
        whole = least <= len(sentences) <= most and all(map(_STATEMENT.fullmatch, sentences))
        return Score(valid and whole and all(_mentions(text, element) for element in item.facts["elements"]), valid)
    right = (item.answer["content"], *item.facts.get("also", ()))
    return Score(_plain(text) in map(_plain, right), valid)


def _plain(text: str) -> str:
    return text.removesuffix(".").lower()


def _mentions(text: str, element: str) -> bool:
    return re.search(rf"\b{re.escape(element)}\b", text, re.IGNORECASE) is not None


def _said(user: str, assistant: str) -> tuple[Message, Message]:
    return {"role": "user", "content": user}, {"role": "assistant", "content": assistant}


def _greeting(rng: random.Random) -> Item:
    if rng.random() < 0.25:
        question, answer = f"{rng.choice(THANKS)}{rng.choice(REASONS)}.", "You are welcome."
        parting = rng.choice(PARTINGS) if rng.random() < 0.75 else ""
        if parting:
            question, answer = f"{question} {parting}{rng.choice(ADDRESSED)}!", f"{answer} {parting}!"
        return Item(_said(question, answer), "greeting")
    hello, who = rng.choice(HELLOS), rng.choice(PEOPLE)
    asks, answer = rng.choice(SMALL_TALK)
    presented = rng.random() < 0.75
    parts = [f"{hello}{rng.choice(ADDRESSED)}!"]
    if presented:
        parts.append(rng.choice(PRESENTED).format(who=who))
    if rng.random() < 0.75:
        parts.append(rng.choice(asks))
    else:
        answer = OFFER
    return Item(_said(" ".join(parts), f"{hello}, {who}! {answer}" if presented else f"{hello}! {answer}"), "greeting")


def _fact(rng: random.Random) -> Item:
    relation, x, y = rng.choice(FACTS)
    question = rng.choice(relation.asks).format(x=x, kind="day" if x in DAYS else "month")
    question = rng.choice(LEADS) + question[0].upper() + question[1:]
    answer = relation.answer.format(x=x, y=y)
    return Item(_said(question, answer), "facts", facts={"also": (y,)})


def _cast(rng: random.Random) -> dict[str, str]:
    """What the sentences of a story are filled with."""
    girl = rng.random() < 0.5
    he, him, his = ("she", "her", "her") if girl else ("he", "him", "his")
    thing, animal = (f"{rng.choice(LOOKS)} {rng.choice(nouns)}" for nouns in (THINGS, ANIMALS))
    return {
        "who": rng.choice(GIRLS if girl else BOYS),
        "place": rng.choice(PLACES),
        "time": rng.choice(TIMES),
        "thing": thing,
        "a_thing": with_article(thing),
        "animal": animal,
        "a_animal": with_article(animal),
        "him": him,
        "his": his,
        "He": he.title(),
        "His": his.title(),
    }


def _told(
    rng: random.Random, level: str, subject: str, pools: list[tuple[str, ...]], sentences: tuple[int, int]
) -> Item:
    cast = _cast(rng)
    size = "long" if level == "long" else "short"
    question = rng.choice(TELL).format(size=size, subject=subject.format(**cast))
    story = " ".join(rng.choice(pool) for pool in pools).format(**cast)
    elements = [cast["who"], *(cast[key] for key in ("thing", "animal") if f"{{a_{key}}}" in subject)]
    if "{place}" in subject:
        elements.append(cast["place"].split()[-1])
    return Item(_said(question, story), level, facts={"elements": tuple(elements), "sentences": sentences})


def _story(rng: random.Random) -> Item:
    named = rng.choice((("thing",), ("animal",), ("thing", "animal")))
    placed = rng.random() < 0.5
    subject = ("{who}, " if len(named) > 1 else "{who} and ") + " and ".join(f"{{a_{key}}}" for key in named)
    pools = [GOES if placed else STAYS, *({"thing": FINDS, "animal": MEETS}[key] for key in named), ENDS]
    return _told(rng, "story", subject + (" {place}" if placed else ""), pools, (2, 6))


def _long(rng: random.Random) -> Item:
    pools = [GOES, WEATHER, FINDS, PLAYS, MEETS, FRIENDS, LOSES, LATE, ENDS]
    return _told(rng, "long", "{who}, {a_thing} and {a_animal} {place}", pools, (7, 10))


def _turns(rng: random.Random) -> Item:
    said = [(memory, memory.values(rng)) for memory in rng.sample(MEMORIES, 2 if rng.random() < 0.8 else 1)]
    messages: list[Message] = []
    for memory, x in said:
        messages.extend(_said(rng.choice(memory.says).format(x=x), memory.reply.format(x=x)))
    memory, x = rng.choice(said)
    messages.extend(_said(rng.choice(memory.asks), memory.answer.format(x=x)))
    return Item(tuple(messages), "turns", facts={"also": (x,)})


_LEVELS: dict[str, Callable[[random.Random], Item]] = {
    "greeting": _greeting,
    "facts": _fact,
    "story": _story,
    "long": _long,
    "turns": _turns,
}
LEVELS = tuple(_LEVELS)
