"""The small model's own template: the same text as the released one, for whatever a text conversation may hold."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dgemma.embedded
from dgemma.text.chat import ChatTemplate

Message = dict[str, Any]

PIECES = [*"aZ\"'{}<|>,: \n1ü", "<|channel>", "<channel|>", "<turn|>"]
TEXT = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)
NAME = st.sampled_from(["a", "B", "b2", "city", "items", "type", "x_y"])
SCALAR = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT
VALUE = st.recursive(SCALAR, lambda v: st.lists(v, max_size=3) | st.dictionaries(NAME, v, max_size=3), max_leaves=6)
FLAG = st.booleans()


def some(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=fields)


PLAIN = st.builds(
    lambda type, rest: {"type": type, **rest},
    st.sampled_from(["string", "integer", "number", "boolean"]),
    some(description=TEXT, enum=st.lists(TEXT, max_size=3), nullable=FLAG),
)
ARRAY = st.builds(lambda items, rest: {"type": "array", "items": items, **rest}, PLAIN, some(description=TEXT))


def objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    properties = st.dictionaries(NAME, inner, max_size=3)
    rest = some(description=TEXT, required=st.lists(NAME, max_size=2), nullable=FLAG)
    return st.builds(lambda p, rest: {"type": "object", "properties": p, **rest}, properties, rest)


SCALARS = PLAIN | ARRAY
SCHEMA = objects(SCALARS | objects(SCALARS) | st.builds(lambda o: {"type": "array", "items": o}, objects(SCALARS)))
FUNCTION = some(description=TEXT, parameters=SCHEMA)
TOOLS = st.lists(st.builds(lambda f: {"type": "function", "function": {"name": "f", **f}}, FUNCTION), max_size=3)
PARTS = st.lists(st.builds(lambda text: {"type": "text", "text": text}, TEXT), max_size=2)
CONTENT = TEXT | PARTS


@st.composite
def turns(draw: st.DrawFn) -> list[Message]:
    """One message; or calls of the model with the answers to none, some or all of them."""
    role = draw(st.sampled_from(["user", "assistant", "assistant", "system", "calls", "calls"]))
    if role != "calls":
        said = draw(some(reasoning=TEXT)) if role == "assistant" else {}
        return [{"role": role, "content": draw(CONTENT), **said}]
    calls = [
        {"type": "function", "id": str(i), "function": {"name": name, "arguments": arguments}}
        for i, (name, arguments) in enumerate(
            draw(st.lists(st.tuples(NAME, st.dictionaries(NAME, VALUE, max_size=3)), min_size=1, max_size=3))
        )
    ]
    answered = draw(st.lists(st.sampled_from(calls), unique_by=lambda call: call["id"]))
    said = draw(some(reasoning=TEXT, reasoning_content=TEXT, content=CONTENT))
    results = [{"role": "tool", "tool_call_id": call["id"], "content": draw(CONTENT)} for call in answered]
    return [{"role": "assistant", "tool_calls": calls, **said}, *results]


@pytest.fixture(scope="module")
def tiny() -> ChatTemplate:
    template = ChatTemplate.from_directory(Path(dgemma.embedded.__file__).parent / "tiny")
    assert template is not None
    return template


@settings(max_examples=300, deadline=None)
@given(st.lists(turns(), min_size=1, max_size=6), TOOLS, FLAG, FLAG)
def test_equals_the_released_template(
    tiny: ChatTemplate, v2: ChatTemplate, drawn: list[list[Message]], tools: Any, think: bool, reply: bool
) -> None:
    messages = [message for turn in drawn for message in turn]
    options: dict[str, Any] = {"enable_thinking": think, "add_generation_prompt": reply}
    assert tiny.render(messages, tools, **options) == v2.render(messages, tools, **options)


CALL = {"type": "function", "id": "1", "function": {"name": "add", "arguments": {"b": [2, "x"], "a": -1.5}}}
LONG: list[Message] = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "One"},
    {"role": "assistant", "content": "<|channel>thought\nhm\n<channel|>Two"},
    {"role": "user", "content": "Add"},
    {"role": "assistant", "reasoning": "so", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "content": " 3 "},
    {"role": "assistant", "content": "3"},
]


def test_every_prefix_of_a_conversation(tiny: ChatTemplate, v2: ChatTemplate, weather: Message) -> None:
    for end, start, tools, think, reply in product(range(2, 8), (0, 1), ([], [weather]), (False, True), (False, True)):
        options: dict[str, Any] = {"enable_thinking": think, "add_generation_prompt": reply}
        messages = LONG[start:end]
        assert tiny.render(messages, tools, **options) == v2.render(messages, tools, **options)


def test_notation(tiny: ChatTemplate, weather: Message) -> None:
    """Without the released file at hand: the forms that its notation is known by."""
    rendered = tiny.render(LONG, [weather], enable_thinking=True, add_generation_prompt=False)
    assert rendered == (
        '<bos><|turn>system\n<|think|>\nBe brief.<|tool>declaration:get_weather{description:<|"|>Weather of a city'
        '<|"|>,parameters:{properties:{city:{description:<|"|>Its name<|"|>,type:<|"|>STRING<|"|>},days:{type:<|"|>'
        'INTEGER<|"|>}},required:[<|"|>city<|"|>],type:<|"|>OBJECT<|"|>}}<tool|><turn|>\n'
        "<|turn>user\nOne<turn|>\n<|turn>model\nTwo<turn|>\n<|turn>user\nAdd<turn|>\n"
        '<|turn>model\n<|channel>thought\nso\n<channel|><|tool_call>call:add{a:-1.5,b:[2,<|"|>x<|"|>]}<tool_call|>'
        '<|tool_response>response:add{value:<|"|> 3 <|"|>}<tool_response|>3<turn|>\n'
    )


def test_media_are_refused(tiny: ChatTemplate) -> None:
    with pytest.raises(ValueError, match="this model reads text, not image"):
        tiny.render([{"role": "user", "content": [{"type": "image"}]}])
