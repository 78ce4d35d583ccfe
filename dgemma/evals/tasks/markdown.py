"""Markdown: close what is open, make lists and headings, mark words."""

import random
import re

from dgemma.evals.tasks import Answer, Item, Score, words

LEVELS: tuple[str, ...] = ("close", "list", "heading", "nested")

SLOTS = {
    "name": words.PERSON,
    "things": words.THING,
    "city": words.CITY,
    "count": words.whole(2, 99),
    "day": words.DAY,
}
SENTENCES = (
    "{name} buys {count} {things} in {city}",
    "on {day} {name} goes to {city}",
    "{count} {things} are for {name}",
    "{name} and the {things} of {city}",
    "the {things} come from {city} on {day}",
    "{name} has {count} {things} on {day}",
)
SENTENCE = words.sentence(SENTENCES, **SLOTS)
MARKS = {"bold": "**", "italic": "_", "code": "`"}
CLOSED_BY = {"**": "**", "_": "_", "`": "`", "```": "\n```", "](": ")"}

CLOSE = (
    "Close the open Markdown: {text}",
    "Repair this Markdown: {text}",
    "{text}\nClose what is open.",
    "Some Markdown is not closed here, close it: {text}",
    "End the open marks: {text}",
)
BULLETS = (
    "Make a list: {items}",
    "{items}\nAs a list with dashes, please.",
    "Bullet list of {items}",
    "Turn into a list: {items}",
)
NUMBERS = (
    "Number these: {items}",
    "{items}\nAs a numbered list, please.",
    "Numbered list of {items}",
    "Make a list 1. 2. 3.: {items}",
)
TITLES = ('Make a {rank} of "{title}".', '"{title}" as a {rank}, please.', "Write this as a {rank}: {title}")
OVER = ('Put the {rank} "{title}" over: {text}', "{text}\nGive this the {rank}: {title}")
MARKED = ("Make {word} {kind}: {text}", "{text}\nSet {word} in {kind}.", "Write {word} {kind} in this: {text}")
LINKED = (
    "Link {word} to {url}: {text}",
    "{text}\nMake {word} a link to {url}.",
    "Set a link from {word} to {url}: {text}",
)
GROUPED = (
    "Nested list: {groups}",
    "Make a list in a list: {groups}",
    "{groups}\nAs a nested list, please.",
    "List with sublists: {groups}",
)
RANKS = {"title": "#", "subtitle": "##"}

_MARK = re.compile(r"```|\*\*|`|_|\[|\]\(|\)")


def draw(rng: random.Random, level: str) -> Item:
    if level == "close":
        question, answer = _close(rng, 1)
    elif level == "list":
        question, answer = _list(rng)
    elif level == "heading":
        question, answer = rng.choice((_title, _marked, _linked))(rng)
    else:
        question, answer = _close(rng, rng.randint(2, 3)) if rng.random() < 0.5 else _groups(rng)
    return Item(({"role": "user", "content": question}, {"role": "assistant", "content": answer}), level)


def check(item: Item, answer: Answer) -> Score:
    text = answer.text.strip()
    return Score(text == item.answer["content"], bool(text) and not unclosed(text))


def unclosed(text: str) -> list[str]:
    """The marks that are open at the end, outermost first: `**`, `_`, a back-tick or three, `[`, `](`."""
    marks: list[str] = []
    for mark in _MARK.findall(text):
        last = marks[-1] if marks else ""
        if last in ("`", "```"):
            if mark == last:
                marks.pop()
        elif mark == "](":
            if last == "[":
                marks[-1] = mark
        elif mark == ")":
            if last == "](":
                marks.pop()
        elif mark == last:
            marks.pop()
        else:
            marks.append(mark)
    return marks


def _close(rng: random.Random, depth: int) -> tuple[str, str]:
    """Marks opened one within the other, all open at the end."""
    first, *between = (SENTENCE.draw(rng)[1].split() for _ in range(depth))
    at = rng.randint(0, len(first) - 2)
    before = first[:at]
    if before and rng.random() < 0.5:
        mark = rng.choice(tuple(MARKS.values()))
        before[0] = f"{mark}{before[0]}{mark}"
    # Code, links and fences only come innermost: marks do not count in code, and an address or a fence takes none.
    styles = rng.sample(("**", "_"), depth - 1)
    last = rng.choice([mark for mark in CLOSED_BY if mark not in styles and (depth == 1 or mark != "```")])
    rest = " ".join(first[at:])
    if last == "```":
        return _asked(rng, f"{' '.join(before)}\n```\n{rest}".strip(), [last])
    opened = [f"{mark}{part[0]} {part[1]}" for mark, part in zip(styles, between, strict=True)]
    inner = f"[{rest}]({_url(rng)}" if last == "](" else last + rest
    return _asked(rng, " ".join([*before, *opened, inner]), [*styles, last])


def _asked(rng: random.Random, text: str, marks: list[str]) -> tuple[str, str]:
    return rng.choice(CLOSE).format(text=text), text + "".join(CLOSED_BY[mark] for mark in reversed(marks))


def _list(rng: random.Random) -> tuple[str, str]:
    items = rng.sample(rng.choice((words.THINGS, words.PEOPLE, words.CITIES)), rng.randint(3, 8))
    if rng.random() < 0.5:
        items = [f"{rng.randint(2, 99)} {item}" for item in rng.sample(words.THINGS, len(items))]
    told = ", ".join(items)
    if rng.random() < 0.5:
        return rng.choice(BULLETS).format(items=told), "\n".join(f"- {item}" for item in items)
    return rng.choice(NUMBERS).format(items=told), "\n".join(f"{i}. {item}" for i, item in enumerate(items, 1))


def _title(rng: random.Random) -> tuple[str, str]:
    rank = rng.choice(tuple(RANKS))
    title = words.TITLE.draw(rng)[1]
    heading = f"{RANKS[rank]} {title}"
    if rng.random() < 0.2:
        return rng.choice(TITLES).format(rank=rank, title=title), heading
    text = SENTENCE.draw(rng)[1]
    return rng.choice(OVER).format(rank=rank, title=title, text=text), f"{heading}\n\n{text}"


def _marked(rng: random.Random) -> tuple[str, str]:
    kind = rng.choice(tuple(MARKS))
    plain, word, marked = _word(rng, MARKS[kind] + "{}" + MARKS[kind])
    return rng.choice(MARKED).format(word=word, kind=kind, text=plain), marked


def _linked(rng: random.Random) -> tuple[str, str]:
    url = _url(rng)
    plain, word, marked = _word(rng, f"[{{}}]({url})")
    return rng.choice(LINKED).format(word=word, url=url, text=plain), marked


def _word(rng: random.Random, mark: str) -> tuple[str, str, str]:
    """A sentence, one of its words, and the sentence with that word in a mark."""
    template = rng.choice(SENTENCES)
    said = words.draw_all(SLOTS, words.places(template), rng)[1]
    name = rng.choice(tuple(said))
    return template.format(**said), said[name], template.format(**{**said, name: mark.format(said[name])})


def _groups(rng: random.Random) -> tuple[str, str]:
    """A list of two to four people with what each has."""
    owners = rng.sample(words.PEOPLE, rng.randint(2, 4))
    owned = {owner: rng.sample(words.THINGS, rng.randint(2, 5)) for owner in owners}
    told = "; ".join(f"{owner}: {', '.join(things)}" for owner, things in owned.items())
    lines = [f"- {owner}\n" + "\n".join(f"  - {thing}" for thing in things) for owner, things in owned.items()]
    return rng.choice(GROUPED).format(groups=told), "\n".join(lines)


def _url(rng: random.Random) -> str:
    return f"https://example.org/{rng.choice(words.NOUNS)}"
