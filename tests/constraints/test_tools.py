"""Calls of tools made into automata, read back by the parser of outputs and checked by jsonschema."""

import random
from typing import Any

import jsonschema
import pytest
from schemas import schema_of
from walks import Walker

from dgemma.constraints.automaton import Automaton, build
from dgemma.constraints.tools import tool_calls
from dgemma.text.calls import QUOTE, format_value
from dgemma.text.output import CALL, CALL_END, parse

WEATHER = {
    "type": "object",
    "properties": {
        "units": {"type": ["string", "null"], "enum": ["C", "F", None]},
        "city": {"type": "string", "minLength": 1},
        "Days": {"type": "integer", "minimum": 1, "maximum": 14},
        "exact place": {
            "type": "object",
            "properties": {"lat": {"type": "number"}, "lon": {"type": "number"}},
            "required": ["lat", "lon"],
            "additionalProperties": False,
        },
        'by "x"': {"type": "array", "items": {"type": "boolean"}},
    },
    "required": ["city"],
    "additionalProperties": False,
}


def tool(name: str, parameters: Any = None) -> dict[str, Any]:
    function = {"name": name} if parameters is None else {"name": name, "parameters": parameters}
    return {"type": "function", "function": function}


TOOLS = [tool("get_weather", WEATHER), tool("now"), tool("note", {"type": "object", "properties": {"t": {}}})]


def accepts(found: Automaton, text: str) -> bool:
    """Whether the text is accepted, its markers taken as special tokens."""
    columns: list[int] = []
    while text:
        special = next((i for i, token in enumerate(found.specials) if text.startswith(token)), None)
        columns += [256 + special] if special is not None else text[0].encode()
        text = text[len(found.specials[special]) if special is not None else 1 :]
    return found.accepts(columns)


def assert_valid(found: Automaton, tools: list[dict[str, Any]], draws: int, seed: int = 0) -> set[str]:
    """Random texts parse and validate; returns the names called, one call a text at least."""
    parameters = {t["function"]["name"]: t["function"].get("parameters", {"maxProperties": 0}) for t in tools}
    walker, names = Walker(found, seed), set()
    for i in range(draws):
        output = parse(walker.text(steps=3 * i % 70))
        repeated = [problem for problem in output.problems if "stands twice" in problem]  # no expression can forbid it
        assert output.problems == repeated
        assert output.complete
        if not repeated:
            assert output.tool_calls
            assert not output.content
        for call in output.tool_calls:
            names.add(call.name)
            jsonschema.validate(call.arguments, parameters[call.name])
    return names


@pytest.mark.parametrize("many", [False, True])
def test_calls_are_read_back_and_valid(many: bool) -> None:
    assert assert_valid(build(tool_calls(TOOLS, many=many)), TOOLS, 100) == {"get_weather", "now", "note"}


def test_calls_under_random_schemas() -> None:
    for seed in range(30):
        rng = random.Random(seed)
        names = ["a", "Bb", "c"][: rng.randint(1, 3)]
        parameters = {"type": "object", "properties": {n: schema_of(rng, 2) for n in names}, "required": names[:1]}
        tools = [tool("f", parameters)]
        assert assert_valid(build(tool_calls(tools)), tools, 10, seed) <= {"f"}


def test_calls_look_as_the_templates_write_them() -> None:
    found = build(tool_calls(TOOLS))
    arguments = {"units": None, "city": 'a "b"\n{c}: é', "Days": 3, "exact place": {"lon": 1.5, "lat": -2}}
    text = f"{CALL}call:get_weather{format_value(arguments)}{CALL_END}"
    assert accepts(found, text)
    assert accepts(found, text.replace("None", "null"))
    assert not accepts(found, text.replace(",", ", "))
    assert not accepts(found, text.replace("Days:3", "Days:15"))
    assert accepts(found, f"{CALL}call:now{{}}{CALL_END}")
    assert not accepts(found, f"{CALL}call:now{{a:1}}{CALL_END}")
    strange = f'{QUOTE}by "x"{QUOTE}:[true,false]'
    assert accepts(found, f"{CALL}call:get_weather{{{strange},city:{QUOTE}x{QUOTE}}}{CALL_END}")


def test_a_string_cannot_spell_its_own_end() -> None:
    found = build(tool_calls([tool("f", {"properties": {"s": {"type": "string"}}, "required": ["s"]})]))
    quote = found.specials.index(QUOTE) + 256
    start = [found.specials.index(CALL) + 256, *b"call:f{s:", quote]
    end = [quote, *b"}", found.specials.index(CALL_END) + 256]
    for text in (b"<", b"<|", b"<<|<|", b"a <| b", b"|>", b'"', b"<|x", b"}<tool_call|>"):
        assert found.accepts([*start, *text, *end]), text
        assert parse(f"{CALL}call:f{{s:{QUOTE}{text.decode()}{QUOTE}}}{CALL_END}").tool_calls[0].arguments == {
            "s": text.decode()
        }
    for text in (QUOTE.encode(), b'<|<|"', b'<<|"|>x'):
        assert not found.accepts([*start, *text, *end]), text


def test_one_tool_by_name_and_several_calls() -> None:
    found = build(tool_calls(TOOLS, name="now"))
    call = f"{CALL}call:now{{}}{CALL_END}"
    assert accepts(found, call)
    assert not accepts(found, call * 2)
    assert not accepts(found, "")
    assert assert_valid(found, TOOLS, 3) == {"now"}
    several = build(tool_calls(TOOLS, name="now", many=True))
    assert accepts(several, call)
    assert accepts(several, call * 3)
    assert not accepts(several, "")


def test_what_cannot_be_a_call_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no tool 'then'; known are 'get_weather', 'now', 'note'"):
        tool_calls(TOOLS, name="then")
    with pytest.raises(ValueError, match="at least one tool"):
        tool_calls([])
    with pytest.raises(ValueError, match="'a b' cannot stand in a call"):
        tool_calls([tool("a b")])
    with pytest.raises(ValueError, match="tool 'f': parameters #/properties/a: keyword 'uniqueItems'"):
        tool_calls([tool("f", {"properties": {"a": {"uniqueItems": True}}})])
    with pytest.raises(ValueError, match="cannot stand in a call: it would end the string"):
        tool_calls([tool("f", {"properties": {"a": {"const": QUOTE}}})])
    with pytest.raises(ValueError, match=r"tools\[0\]"):
        tool_calls([{"name": "f"}])
