"""JSON Schema (draft 2020-12, and what of older ones and of OpenAPI is in use) to the texts of its valid values.

Every text is valid under the schema. These valid ones are not among them:

- members that an object's `properties` do not list, unless `additionalProperties` says true or a schema; likewise items
  behind `prefixItems`, unless `items` does; members in another order than the listed one (in calls: the sorted one);
- numbers with exponents or more than 15 digits; integers with a fraction; listed numbers but as Python's json has them;
- escapes in keys, and in strings with a length, a pattern or a format, where a raw character will do;
- formats beyond what `strings.FORMATS` holds; values deeper than `DEPTH` rounds of a reference, or `DEPTH_FREE` levels
  where anything is allowed; blanks but for `WHITESPACE`;
- bound by `oneOf`, all options must tell themselves apart by type, listed values or a required member.

No expression can forbid that an additional member repeats a key: in JSON the last one counts, a call is malformed.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from dgemma.constraints.facts import Facts, Options, Places, Reader, Span, same
from dgemma.constraints.keywords import Place
from dgemma.constraints.nodes import (
    ANY,
    EMPTY,
    NOTHING,
    Both,
    Choice,
    Node,
    Repeat,
    choice,
    optional,
    sequence,
)
from dgemma.constraints.notation import CALL, JSON, WHITESPACE, Notation
from dgemma.constraints.numbers import number
from dgemma.constraints.strings import other_than

__all__ = ["CALL", "JSON", "WHITESPACE", "Notation", "json_schema"]


def json_schema(schema: Mapping[str, Any] | bool, notation: Notation = JSON) -> Node:
    """The texts of values that are valid under the schema.

    Raises ValueError with the JSON pointer and the keyword for what is not supported, wrong or too large.
    """
    try:
        return _Writer(schema, notation).value((Place(schema),))
    except RecursionError:
        raise ValueError("#: the schema is nested too deeply") from None


def type_of(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "integer" if value.is_integer() else "number"
        case str():
            return "string"
    return "object" if isinstance(value, Mapping) else "array"


class _Writer:
    """Writes the values of one schema."""

    def __init__(self, root: Any, notation: Notation):
        self.reader = Reader(root)
        self.notation = notation
        self.comma = sequence(",", notation.blank)
        self.free: dict[int, Node] = {}  # any value, by its levels

    def value(self, places: Places) -> Node:
        if len(places) == 1 and places[0].schema is True:
            levels = places[0].free
            if levels not in self.free:
                self.free[levels] = self.write(self.reader.facts(places))
            return self.free[levels]
        return self.write(self.reader.facts(places))

    def write(self, facts: Facts) -> Node:
        if not facts.types:
            return NOTHING
        if facts.values is not None:
            return self.listed(facts)
        if facts.options:
            first, *others = facts.options
            base = replace(facts, options=tuple(others))
            options = [self.reader.add(base, place) for place in first.schemas]
            if first.keyword == "oneOf":
                self.check_apart(first, options)
            return _choice([self.write(option) for option in options])
        kinds: dict[str, Callable[[], Node]] = {
            "null": lambda: self.notation.null,
            "boolean": lambda: choice("true", "false"),
            "number": lambda: number(facts.low, facts.high),
            "string": lambda: self.string(facts),
            "array": lambda: self.array(facts),
            "object": lambda: self.object(facts),
        }
        if "number" not in facts.types:
            kinds["integer"] = lambda: number(facts.low, facts.high, integer=True)
        return _choice([write() for kind, write in kinds.items() if kind in facts.types])

    def listed(self, facts: Facts) -> Node:
        """The values of `enum` and `const` that all else allows."""
        values = [value for value in facts.values or () if type_of(value) in facts.types]
        for value in values:
            self.reader.spend(len(json.dumps(value)), facts.place)
        try:
            literals = _choice([self.notation.literal(value) for value in values])
        except ValueError as error:
            raise ValueError(f"{facts.place.pointer}: {error}") from None
        others = replace(facts, values=None, types=frozenset(map(type_of, values)) & facts.types)
        if not values or others == Facts(facts.place, types=others.types):
            return literals
        return Both((literals, self.write(others)))

    def check_apart(self, group: Options, options: list[Facts]) -> None:
        for i, a in enumerate(options):
            for j, b in enumerate(options):
                if i != j and not self.excludes(a, b):
                    raise group.place.error(
                        "oneOf", f"is supported with options told apart by type, values or a required member: {i}, {j}"
                    )

    def excludes(self, a: Facts, b: Facts) -> bool:
        """Whether what is written for `a` is certainly not valid under `b`."""
        self.reader.spend(10, a.place)
        kinds = a.types
        if a.values is not None:
            values = [value for value in a.values if type_of(value) in a.types]
            if b.values is not None and not any(same(v, w) for v in values for w in b.values):
                return True
            kinds &= set(map(type_of, values))
        if b.values is not None and not kinds & set(map(type_of, b.values)):
            return True
        if not kinds & b.types:
            return True
        if kinds != {"object"}:
            return False
        names, open_ended = self.names(a)
        if not open_ended and not a.options and not a.values and set(b.required) - set(names):
            return True
        return any(
            self.excludes(self.reader.facts(theirs), self.reader.facts(others))
            for name in a.required
            if (theirs := self.binding(a, name)) and (others := self.binding(b, name))
        )

    def string(self, facts: Facts) -> Node:
        if not facts.texts and facts.length == Span():
            return sequence(self.notation.quote, self.notation.characters, self.notation.quote)
        texts = list(facts.texts)
        if facts.length != Span():
            texts.append(Repeat(ANY, facts.length.least, facts.length.most))
        return self.notation.string(texts[0] if len(texts) == 1 else Both(tuple(texts)))

    def array(self, facts: Facts) -> Node:
        listed = max((len(items.prefix) for items in facts.items), default=0)
        least, most = facts.count.least, facts.count.most
        if most is not None and most < least:
            return NOTHING
        # Behind listed items others come only where they are spoken of, or needed.
        if listed and not any(items.rest for items in facts.items):
            most = max(listed, least) if most is None else min(most, max(listed, least))
        listed = listed if most is None else min(listed, most)

        def item(at: int) -> Node:
            found = [place for items in facts.items if (place := items.of(at))]
            return self.value(tuple(found) or self.anything(facts))

        node: Node = EMPTY
        if most is None or most > listed:
            rest = item(listed)
            if not listed:
                some = sequence(rest, Repeat(sequence(self.comma, rest), max(least - 1, 0), most and most - 1))
                return sequence("[", some if least else optional(some), "]")
            node = Repeat(sequence(self.comma, rest), max(least - listed, 0), most and most - listed)
        for at in reversed(range(listed)):
            node = sequence(*([self.comma] if at else []), item(at), node)
            node = node if at < least else optional(node)
        return sequence("[", node, "]")

    def object(self, facts: Facts) -> Node:
        names, open_ended = self.names(facts)
        least, most = facts.size.least, facts.size.most
        if most is not None and most < max(least, len(set(facts.required))):
            return NOTHING
        pairs: list[tuple[Node, bool]] = []  # and whether they must be there
        for name in self.notation.order(names):
            self.reader.spend(len(name), facts.place)
            value = self.value(self.binding(facts, name) or self.anything(facts))
            if name in facts.required or value != NOTHING:
                pairs.append((self.notation.pair(self.notation.name(name), value), name in facts.required))
        if least > max(1, len(set(facts.required))):
            raise facts.place.error("minProperties", "is supported up to 1, or as many as are required")
        if most is not None and most < len(pairs) + open_ended and (pairs or not open_ended):
            raise facts.place.error("maxProperties", "is supported where no properties are listed")
        if most == 0:
            return sequence("{}")
        if open_ended:
            pair = self.others(facts, frozenset(names))
            pairs.append((sequence(pair, Repeat(sequence(self.comma, pair), 0, most and most - 1)), False))
        return sequence("{", self.some(pairs, least > 0), "}")

    def names(self, facts: Facts) -> tuple[list[str], bool]:
        """The members that are spoken of, and whether others may stand beside them."""
        listed = [name for members in facts.members for name in members.properties or ()]
        open_ended = all(members.properties is None or members.additional for members in facts.members)
        if any(members.additional and members.additional.schema is False for members in facts.members):
            open_ended = any(members.patterned for members in facts.members)
        return list(dict.fromkeys([*listed, *facts.required])), open_ended

    def binding(self, facts: Facts, name: str) -> Places:
        return tuple(place for members in facts.members if (place := members.of(name)))

    def anything(self, facts: Facts) -> Places:
        """What nothing is said of, a level below."""
        place = facts.place
        return (Place(True, place.pointer, place.references, place.level + 1, place.free - 1),)

    def others(self, facts: Facts, names: frozenset[str]) -> Node:
        """A member that is not spoken of by name."""
        for members in facts.members:
            if members.patterned:
                if len(facts.members) > 1 or names:
                    raise members.place.error("patternProperties", "is not supported beside other members")
                texts, place = members.patterned
                return self.notation.pair(self.notation.keys(texts), self.value((place,)))
        found = tuple(members.additional for members in facts.members if members.additional)
        value = self.value(found or self.anything(facts))
        return self.notation.pair(self.notation.keys(other_than(names) if names else Repeat(ANY)), value)

    def some(self, pairs: list[tuple[Node, bool]], needed: bool) -> Node:
        """The pairs in order, with commas, those that need not be there left out or not; `needed`: at least one."""
        first = next((i for i, (_, must) in enumerate(pairs) if must), None)
        if first is None:
            node = self.any_of(pairs) if pairs else NOTHING
            return node if needed else optional(node)
        before = [optional(sequence(pair, self.comma)) for pair, _ in pairs[:first]]
        return sequence(*before, pairs[first][0], *self.behind(pairs[first + 1 :]))

    def behind(self, pairs: list[tuple[Node, bool]]) -> list[Node]:
        """The pairs behind another one."""
        nodes = [(sequence(self.comma, pair), must) for pair, must in pairs]
        return [node if must else optional(node) for node, must in nodes]

    def any_of(self, pairs: list[tuple[Node, bool]]) -> Node:
        """At least one of pairs that need not be there; n log n copies."""
        if len(pairs) == 1:
            return pairs[0][0]
        half = len(pairs) // 2
        return choice(sequence(self.any_of(pairs[:half]), *self.behind(pairs[half:])), self.any_of(pairs[half:]))


def _choice(options: list[Node]) -> Node:
    possible = tuple(option for option in options if option != NOTHING)
    return possible[0] if len(possible) == 1 else Choice(possible)
