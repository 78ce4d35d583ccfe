"""Strings: how JSON and calls spell characters, and the formats that a schema may ask for."""

import re
from functools import cache, lru_cache

from dgemma.constraints import regex
from dgemma.constraints.nodes import (
    ANY,
    Both,
    Chars,
    Choice,
    Node,
    Repeat,
    Sequence,
    Special,
    chars,
    choice,
    complement,
    optional,
    sequence,
)

_SHORT = {'"': '"', "\\": "\\", "\b": "b", "\f": "f", "\n": "n", "\r": "r", "\t": "t"}
_ESCAPED = Chars(((0, 0x1F), (0x22, 0x22), (0x5C, 0x5C)))
_RAW = complement(_ESCAPED)
_HEX = chars("0123456789abcdefABCDEF")
_PAIR = sequence(chars("dD"), chars("89abAB"), _HEX, _HEX, "\\u", chars("dD"), chars("cdefCDEF"), _HEX, _HEX)
_UNIT = choice(
    sequence(chars("0123456789abcefABCEF"), _HEX, _HEX, _HEX), sequence(chars("dD"), chars("01234567"), _HEX, _HEX)
)

JSON_CHARACTERS = Repeat(choice(_RAW, sequence("\\", choice(chars('"\\/bfnrt'), sequence("u", choice(_UNIT, _PAIR))))))
"""What may stand in a JSON string: raw characters and every escape; half a surrogate pair is none."""

# Without `<|"`, the beginning of what ends a string once the special tokens are text.
CALL_CHARACTERS = sequence(
    Repeat(
        choice(
            complement(chars("<")),
            sequence(
                "<", Repeat(choice("<", "|<")), choice(complement(chars("<|")), sequence("|", complement(chars('<"'))))
            ),
        )
    ),
    optional(sequence("<", Repeat(choice("<", "|<")), optional("|"))),
)

# Bare keys of calls, as the reader of calls takes them: no blanks, no punctuation of the notation.
_BLANKS = ((0, 0x20), (0x7F, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A), (0x2028, 0x2029), (0x202F, 0x202F))
_BARE = complement(Chars((*_BLANKS, (0x205F, 0x205F), (0x3000, 0x3000), *chars('{}[],:<"').ranges)))
BARE_KEYS = Repeat(_BARE, 1)


def spell_json(node: Node) -> Node:
    """The same texts within a JSON string; what must be escaped has its short escape, or else \\u and small digits."""
    match node:
        case Chars():
            return _spell_set(node)
        case Sequence(parts):
            return Sequence(tuple(map(spell_json, parts)))
        case Choice(options):
            return Choice(tuple(map(spell_json, options)))
        case Repeat(part, least, most):
            return Repeat(spell_json(part), least, most)
        case Both(parts):
            return Both(tuple(map(spell_json, parts)))  # every character has one spelling
        case Special():
            raise ValueError(f"the special token {node.token} cannot stand within a string")


def spell_call(node: Node) -> Node:
    """The same texts within a string of a call, where nothing is escaped, less those that hold its end."""
    return Both((node, CALL_CHARACTERS))


@lru_cache(1024)
def _spell_set(node: Chars) -> Node:
    raw = _intersect(node, _RAW)
    escaped = [chr(c) for low, high in _intersect(node, _ESCAPED).ranges for c in range(low, high + 1)]
    if not escaped:
        return raw
    short = "".join(_SHORT[c] for c in escaped if c in _SHORT)
    long = [f"{ord(c):02x}" for c in escaped if c not in _SHORT]
    units = [
        sequence(f"u00{high}", chars("".join(u[1] for u in long if u[0] == high))) for high in {u[0] for u in long}
    ]
    return choice(raw, sequence("\\", choice(chars(short), *units)))


def _intersect(a: Chars, b: Chars) -> Chars:
    pairs = [(max(low, start), min(high, end)) for low, high in a.ranges for start, end in b.ranges]
    return Chars(tuple(sorted(pair for pair in pairs if pair[0] <= pair[1])))


def other_than(names: frozenset[str]) -> Node:
    """Every text but these; as large as the names are long."""
    ends = "" in names
    heads = sorted({name[0] for name in names if name})
    tails = [sequence(h, other_than(frozenset(n[1:] for n in names if n.startswith(h)))) for h in heads]
    rest = sequence(complement(chars("".join(heads))), Repeat(ANY))
    return choice(*tails, rest, *([] if ends else [""]))


_DAY = (
    r"(?:[12]\d{3}-(?:(?:0[1-9]|1[0-2])-(?:0[1-9]|1\d|2[0-8])|(?:0[13-9]|1[0-2])-(?:29|30)|(?:0[13578]|1[02])-31)"
    r"|(?:[12]\d(?:0[48]|[2468][048]|[13579][26])|(?:1[26]|2[048])00)-02-29)"
)
_CLOCK = r"(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d{1,6})?(?:Z|[+-](?:[01]\d|2[0-3]):[0-5]\d)"
_HOST = r"[A-Za-z0-9]+(?:-[A-Za-z0-9]+)*"
_OCTET = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_WORD = r"[A-Za-z0-9_+-]+"
_PATH = r"(?:[A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-Fa-f]{2})"
_REST = rf"(?:{_PATH}|[/?])"

FORMATS = {
    "date": _DAY,
    "time": _CLOCK,
    "date-time": rf"{_DAY}T{_CLOCK}",
    "email": rf"{_WORD}(?:\.{_WORD})*@{_HOST}(?:\.{_HOST})+",
    "hostname": rf"{_HOST}(?:\.{_HOST})*",
    "uuid": r"[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}",
    "ipv4": rf"{_OCTET}(?:\.{_OCTET}){{3}}",
    "uri": rf"https?://{_HOST}(?:\.{_HOST})*(?::[1-9]\d{{0,3}})?(?:/{_PATH}*)*(?:\?{_REST}*)?(?:#{_REST}*)?",
}
"""Expressions of the formats that bind a string: the years 1000 to 2999, ASCII addresses, http and https alone."""

NOTES = ("int32", "int64", "float", "double", "password")
"""Formats that bind nothing here: they speak of how a program stores a value or shows it."""


@cache
def format_node(name: str) -> Node:
    return regex.fullmatch(FORMATS[name])


def is_bare(key: str) -> bool:
    """Whether a key of a call can stand without quotes."""
    return re.fullmatch(r'[^\s{}\[\],:<"]+(?:[^{}\[\],:<"]*[^\s{}\[\],:<"])?', key) is not None
