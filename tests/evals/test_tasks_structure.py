import json
import random
import re
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import pytest

from dgemma.evals import tasks
from dgemma.evals.tasks import extraction, markdown, tables
from dgemma.text.calls import ToolCall, format_value, parse_call
from dgemma.text.messages import prepare_messages, prepare_tools

NAMES = ("tools", "extraction", "tables", "markdown")
CASES = [(name, level) for name in NAMES for level in tasks.get(name).LEVELS]
DISTINCT = {("tools", "none"): 0.75}
CALLS = ("call", "two", "thinking")


@dataclass(frozen=True)
class Said:
    text: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)


def draws(name: str, level: str, count: int, seed: int = 1) -> list[tasks.Item]:
    rng = random.Random(seed)
    return [tasks.get(name).draw(rng, level) for _ in range(count)]


def calls(item: tasks.Item, **changes: Any) -> list[ToolCall]:
    """The right calls as they come back from the model's notation, with changed arguments."""
    functions = [call["function"] for call in item.answer.get("tool_calls", ())]
    return [parse_call(f"call:{f['name']}{format_value({**f['arguments'], **changes})}") for f in functions]


def reference(item: tasks.Item) -> Said:
    return Said(item.answer["content"], item.answer.get("reasoning", ""), calls(item))


@pytest.mark.parametrize(("name", "level"), CASES)
def test_draws_depend_on_the_seed_alone_and_differ(name: str, level: str) -> None:
    items = draws(name, level, 2000)
    assert items[:50] == draws(name, level, 50)
    assert items[:50] != draws(name, level, 50, seed=2)
    asked = {json.dumps([item.question, item.tools]) for item in items}
    assert len(asked) >= DISTINCT.get((name, level), 0.95) * len(items)
    assert {item.level for item in items} == {level}


@pytest.mark.parametrize(("name", "level"), CASES)
def test_the_reference_is_exact_and_corrupted_answers_are_not(name: str, level: str) -> None:
    task = tasks.get(name)
    for item in draws(name, level, 300):
        score = task.check(item, reference(item))
        assert score.exact, item
        assert score.valid, item
        text = item.answer["content"]
        for wrong in (text[:-1], text + "x", "x" + text, text.swapcase() + "!"):
            assert not task.check(item, Said(wrong)).exact, (item, wrong)
        score = task.check(item, Said())
        assert (score.exact, score.valid) == (False, False)


@pytest.mark.parametrize(("name", "level"), CASES)
def test_messages_and_tools_are_accepted_and_short(name: str, level: str) -> None:
    for item in draws(name, level, 300):
        prepared = prepare_messages(item.messages)
        assert [message["role"] for message in prepared] == [message["role"] for message in item.messages]
        assert prepare_tools(item.tools) == list(item.tools)
        assert all(message["content"].isascii() for message in item.messages)
        assert all(len(message["content"]) <= 300 for message in item.question)
        assert all(len(json.dumps(tool)) <= 320 for tool in item.tools)
        assert len(item.answer["content"]) <= 350
        assert item.think == (level == "thinking")


@pytest.mark.parametrize("name", NAMES)
def test_items_are_kept_apart(name: str) -> None:
    task = tasks.get(name)
    training = tasks.items(task, 500, 0, held_out=False)
    assert not {json.dumps(i.question) + json.dumps(i.tools) for i in training} & {
        json.dumps(i.question) + json.dumps(i.tools) for i in tasks.items(task, 100, 0, held_out=True)
    }


@pytest.mark.parametrize("level", CALLS)
def test_a_call_counts_by_its_arguments(level: str) -> None:
    task = tasks.get("tools")
    for item in draws("tools", level, 200):
        function = item.answer["tool_calls"][0]["function"]
        schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in item.tools}
        schema = schemas[function["name"]]
        assert set(schema["required"]) <= set(function["arguments"]) <= set(schema["properties"])
        right = calls(item)[0]
        assert not task.check(item, Said(tool_calls=[right, right])).exact
        assert not task.check(item, Said(tool_calls=calls(item, extra=1))).exact
        for name in schema["required"]:
            missing = {key: value for key, value in right.arguments.items() if key != name}
            for arguments in (missing, right.arguments | {name: [right.arguments[name]]}):
                score = task.check(item, Said(tool_calls=[ToolCall(right.name, arguments)]))
                assert (score.exact, score.valid) == (False, False)
        score = task.check(item, Said(tool_calls=[ToolCall("no_tool", right.arguments)]))
        assert (score.exact, score.valid) == (False, False)


def test_two_tools_are_declared_and_both_come_up() -> None:
    items = draws("tools", "two", 200)
    at = [[t["function"]["name"] for t in i.tools].index(i.answer["tool_calls"][0]["function"]["name"]) for i in items]
    assert 60 < sum(at) < 140
    assert all(len(item.tools) == 2 for item in items)


@pytest.mark.parametrize("level", ["answer", "none"])
def test_a_call_is_no_answer(level: str) -> None:
    for item in draws("tools", level, 100):
        score = tasks.get("tools").check(item, Said(item.answer["content"], tool_calls=[ToolCall("get_time", {})]))
        assert (score.exact, score.valid) == (False, False)


def test_thinking_is_measured_apart_from_the_call() -> None:
    item = draws("tools", "thinking", 1)[0]
    right = tasks.get("tools").check(item, reference(item))
    silent = tasks.get("tools").check(item, Said(tool_calls=calls(item)))
    assert (right.parts, silent.parts) == ({"reasoning": 1.0}, {"reasoning": 0.0})
    assert silent.exact


def test_answers_use_the_result() -> None:
    for item in draws("tools", "answer", 300):
        result = json.loads(item.messages[2]["content"])
        for value in result.values():
            assert isinstance(value, bool) or str(value) in item.answer["content"]


@pytest.mark.parametrize("level", extraction.LEVELS)
def test_extracted_values_stand_in_the_text(level: str) -> None:
    for item in draws("extraction", level, 300):
        question, answer = item.question[0]["content"], json.loads(item.answer["content"])
        assert json.dumps(answer) == item.answer["content"]
        assert list(answer) == list(item.facts["schema"]["properties"])
        assert all(name in question for name in answer)
        for value in leaves(answer):
            assert value is None or isinstance(value, bool) or str(value) in question
        assert level == "types" or None not in leaves(answer)
    kinds = {
        type(value) for item in draws("extraction", level, 300) for value in leaves(json.loads(item.answer["content"]))
    }
    assert kinds >= {"types": {str, int, float, bool, type(None)}}.get(level, {str, int})


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict | list):
        return [leaf for part in (value.values() if isinstance(value, dict) else value) for leaf in leaves(part)]
    return [value]


def test_json_answers_are_compared_with_their_types() -> None:
    for a, b in ((1, 1.0), (1, True), (0, False), (None, False), ([1, 2], [2, 1]), ("1", 1)):
        assert not extraction.same(a, b)
    assert extraction.same({"a": 1, "b": [None]}, {"b": [None], "a": 1})


def test_the_validator_knows_its_keywords() -> None:
    person = {
        "type": "object",
        "properties": {
            "age": {"type": "integer"},
            "size": {"type": ["string", "null"], "enum": ["big", None]},
            "tags": {"type": "array", "items": {"type": "number"}},
        },
        "required": ["age"],
        "additionalProperties": False,
    }
    for value in (
        {"age": 3},
        {"age": 3, "size": None},
        {"age": 3, "size": "big", "tags": []},
        {"age": 1, "tags": [1, 1.5]},
    ):
        assert extraction.fits(value, person), value
    for value in (
        {},
        [],
        None,
        {"age": True},
        {"age": 1.0},
        {"age": "3"},
        {"age": 3, "name": "x"},
        {"age": 3, "size": "small"},
        {"age": 3, "size": 1},
        {"age": 3, "tags": ["1"]},
        {"age": 3, "tags": [True]},
        {"age": 3, "tags": {}},
    ):
        assert not extraction.fits(value, person), value


@pytest.mark.parametrize("text", ['{"a": NaN}', "[1,", "", "```\n{}\n```"])
def test_what_is_not_json_is_not_valid(text: str) -> None:
    assert not extraction.check(draws("extraction", "flat", 1)[0], Said(text)).valid


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("| a | b |\n| --- | --- |\n| 1 | 2 |", True),
        ("| a | b |\n|:---|---:|\n| 1 |  |", True),
        ("| a | b |\n| --- | --- |", False),
        ("| a | b |\n| --- | --- |\n| 1 |", False),
        ("| a | b |\n| --- |\n| 1 | 2 |", False),
        ("| a | b |\n| 1 | 2 |\n| 3 | 4 |", False),
        ("a | b\n--- | ---\n1 | 2", False),
    ],
)
def test_a_table_is_well_formed(text: str, good: bool) -> None:
    assert tables.well_formed(text) is good


def test_filled_tables_follow_the_rule() -> None:
    for item in draws("tables", "fill", 300):
        question = item.question[0]["content"]
        heads, _, *rows = [
            [cell.strip() for cell in line[1:-1].split("|")] for line in item.answer["content"].split("\n")
        ]
        rule = re.search(r"(\w+) = (\w+) ([-+*]) (\w+)", question)
        assert rule is not None
        name, left, sign, right = rule.groups()
        assert name == heads[-1]
        for row in rows:
            known = dict(zip(heads, row, strict=True))
            a, b = int(known.get(left, left)), int(known.get(right, right))
            assert int(row[-1]) == {"+": a + b, "-": a - b, "*": a * b}[sign]


def test_looked_up_values_have_the_right_kind() -> None:
    for item in draws("tables", "lookup", 100):
        number = item.answer["content"].isdigit()
        assert tables.check(item, Said("123")).valid is number
        assert tables.check(item, Said("Nobody")).valid is not number
        assert not tables.check(item, Said("| 1 |")).valid


@pytest.mark.parametrize(
    ("text", "marks"),
    [
        ("**a** _b_ `c`", []),
        ("**a _b", ["**", "_"]),
        ("`**a` _b_", []),
        ("see [a](b", ["]("]),
        ("see [a", ["["]),
        ("see [a](b) (c)", []),
        ("```\na ** b", ["```"]),
        ("```\na\n```", []),
        ("**a _b** c_", ["**", "_", "**", "_"]),
    ],
)
def test_unclosed_marks(text: str, marks: list[str]) -> None:
    assert markdown.unclosed(text) == marks


@pytest.mark.parametrize("name", NAMES)
def test_drawing_is_fast(name: str) -> None:
    task, rng = tasks.get(name), random.Random(0)
    started = perf_counter()
    for i in range(3000):
        task.draw(rng, task.LEVELS[i % len(task.LEVELS)])
    assert perf_counter() - started < 1
