"""Answers that must match something, from a model of random weights: whatever is drawn, they do."""

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from jsonschema import validate
from pydantic import BaseModel

from dgemma.serve import known
from tests.serve.conftest import Site
from tests.serve.test_http import until

ASKED: Any = [{"role": "user", "content": "Tell me of Oslo."}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "size": {"enum": ["small", "large"]},
        "rivers": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
    },
    "required": ["name", "size"],
    "additionalProperties": False,
}


def formatted(schema: dict[str, Any], name: str = "city") -> Any:
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema, "strict": True}}


FORMAT = formatted(SCHEMA)
THINK = {"chat_template_kwargs": {"enable_thinking": True}}


def named(name: str, **function: Any) -> Any:
    return {"type": "function", "function": {"name": name, **function}}


TOOLS = [named("weather", parameters={**SCHEMA, "required": ["name", "rivers"]}), named("now")]
FEW = {"max_denoising_steps": 2}


def create(site: Site, body: dict[str, Any] | None = None, **fields: Any) -> Any:
    fields = {"max_tokens": 90, "model": "default", "messages": ASKED, "seed": 1} | fields
    return site.client.chat.completions.create(**fields, extra_body=FEW | (body or {}))


def refused(site: Site, **body: Any) -> tuple[str, str]:
    response = site.post(messages=ASKED, **body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    return error["param"], error["message"]


@pytest.mark.parametrize("seed", range(2))
def test_json_is_valid_at_every_seed_and_the_same_again(talker: Site, seed: int) -> None:
    answer = create(talker, response_format=FORMAT, seed=seed, n=3)
    for choice in answer.choices:
        validate(json.loads(choice.message.content), SCHEMA)
        assert choice.finish_reason == "stop"
    again = create(talker, response_format=FORMAT, seed=seed, n=3)
    assert [c.message.content for c in again.choices] == [c.message.content for c in answer.choices]
    assert isinstance(
        json.loads(create(talker, response_format={"type": "json_object"}, seed=seed).choices[0].message.content), dict
    )


@pytest.mark.parametrize("body", [{}, THINK])
def test_a_stream_is_the_same_json(talker: Site, body: dict[str, Any]) -> None:
    whole = create(talker, body, response_format=FORMAT).choices[0].message
    chunks = list(create(talker, body, response_format=FORMAT, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.content
    validate(json.loads(whole.content), SCHEMA)
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_thought_may_come_first(talker: Site) -> None:
    thoughts = []
    for seed in range(3):
        message = create(talker, THINK, response_format=FORMAT, seed=seed).choices[0].message
        validate(json.loads(message.content), SCHEMA)
        thoughts.append(getattr(message, "reasoning_content", ""))
    assert any(thoughts)


def test_a_stop_string_still_ends_the_answer(talker: Site) -> None:
    whole = create(talker, response_format=FORMAT).choices[0].message.content
    assert (
        create(talker, response_format=FORMAT, stop='"size"').choices[0].message.content
        == whole[: whole.index('"size"')]
    )
    assert create(talker, response_format=FORMAT, stop="\n").choices[0].message.content == whole


def test_a_pydantic_model_comes_back_parsed(talker: Site) -> None:
    class Point(BaseModel):
        x: int
        label: str | None

    answer = talker.client.chat.completions.parse(
        model="default", messages=ASKED, response_format=Point, max_tokens=60, extra_body=FEW
    )
    assert isinstance(answer.choices[0].message.parsed, Point)


def test_text_that_spells_a_marker_out_is_kept(talker: Site) -> None:
    texts = ["<eos> <|channel>thought\nhm<channel|>", "<|tool_call>call:f{}<tool_call|><turn|>"]
    for text in texts:
        schema = {"type": "object", "properties": {"a": {"const": text}}, "required": ["a"]}
        for body in ({}, {"tools": TOOLS}):
            answer = create(talker, response_format=formatted(schema), max_tokens=120, **body).choices[0]
            assert json.loads(answer.message.content) == {"a": text}
    said = create(talker, {"structured_outputs": {"choice": texts}}).choices[0].message
    assert said.content in texts
    assert not said.tool_calls


@pytest.mark.parametrize("many", [None, True])
def test_forced_calls_have_valid_arguments(talker: Site, many: bool | None) -> None:
    counts = []
    for seed in range(2):
        fields: dict[str, Any] = {"tools": TOOLS, "seed": seed, **({"parallel_tool_calls": many} if many else {})}
        for choice, reason in (("required", "tool_calls"), (named("weather"), "stop")):
            answer = create(talker, tool_choice=choice, **fields).choices[0]
            assert (answer.finish_reason, answer.message.content) == (reason, None)
            counts.append(len(answer.message.tool_calls))
            for call in answer.message.tool_calls:
                arguments = json.loads(call.function.arguments)
                if call.function.name == "weather":
                    validate(arguments, TOOLS[0]["function"]["parameters"])
                else:
                    assert (choice, call.function.name, arguments) == ("required", "now", {})
    chunks = list(create(talker, tool_choice="required", stream=True, tools=TOOLS))
    assert any(chunk.choices[0].delta.tool_calls for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert max(counts) > 1 if many else set(counts) == {1}


@pytest.mark.parametrize(
    ("outputs", "matches"),
    [
        ({"regex": "[a-c]{3}-[0-9]+"}, "[a-c]{3}-[0-9]+"),
        ({"choice": ["red", "green <eos>"]}, "red|green <eos>"),
        ({"grammar": 'start: "(" start ")" | "x"'}, r"\(*x\)*"),
        ({"json": {"type": "integer", "minimum": 0}}, "0|[1-9][0-9]*"),
        ({"json": '{"const": [1, "b"]}'}, r'\[1, ?"b"\]'),
    ],
)
def test_structured_outputs_match_in_chat_and_completions(talker: Site, outputs: Any, matches: str) -> None:
    chat = create(talker, {"structured_outputs": outputs}, max_tokens=40).choices[0]
    (text,) = talker.client.completions.create(
        model="default", prompt="Say", max_tokens=40, extra_body={"structured_outputs": outputs} | FEW
    ).choices
    for said in (chat.message.content, text.text):
        assert re.fullmatch(matches, said), said
    assert chat.finish_reason == text.finish_reason == "stop"


def test_pins_stay_and_a_draft_begins(talker: Site) -> None:
    lm = talker.service.lm
    a, b = lm.tokenizer.encode("a")[0], lm.tokenizer.encode("b")[0]
    wanted = lm.generate(ASKED, seed=4, pins={0: a, 20: b}, max_new_tokens=30, **FEW)
    assert (wanted.tokens[0], wanted.tokens[20]) == (a, b)
    for body in (
        {"pins": {"0": a, "20": b}},
        {"pins": [[0, a], [20, b]]},
        {"vllm_xargs": {"diffusion_pinned": {"0": a, "20": b}}},
        {"vllm_xargs": {"diffusion_pinned": [[20, b], [0, a]]}},
    ):
        assert create(talker, body, seed=4, max_tokens=30).choices[0].message.content == wanted.text
    draft = lm.tokenizer.encode("The old town")
    wanted = lm.generate(ASKED, seed=4, draft=draft, noise_level=0.25, max_new_tokens=30, **FEW)
    assert wanted.text != lm.generate(ASKED, seed=4, max_new_tokens=30, **FEW).text
    for body in ({"draft_text": "The old town"}, {"vllm_xargs": {"diffusion_seed_canvas": draft}}):
        answer = create(talker, body | {"noise_level": 0.25}, seed=4, max_tokens=30)
        assert answer.choices[0].message.content == wanted.text


def test_bound_and_free_requests_share_a_batch(talker: Site) -> None:
    bodies: list[dict[str, Any]] = [
        {"response_format": FORMAT},
        {"extra": {"structured_outputs": {"regex": "(ab)+"}}},
        {"max_tokens": 40},
    ]

    def said(body: dict[str, Any]) -> str:
        fields = dict(body)
        content: str = create(talker, fields.pop("extra", None), **fields).choices[0].message.content
        return content

    alone = [said(body) for body in bodies]
    with ThreadPoolExecutor(3) as clients:
        assert list(clients.map(said, bodies)) == alone


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        (
            {"response_format": formatted({"properties": {"a": {"not": {}}}})},
            "response_format.json_schema.schema",
            "#/properties/a: keyword 'not'",
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format", "needs it"),
        ({"response_format": formatted({}, "a b")}, "response_format.json_schema.name", "pattern"),
        ({"response_format": FORMAT, "max_tokens": 5}, "max_tokens", "no answer of at most 5 tokens"),
        ({"response_format": FORMAT, "autoregressive": True}, "response_format.json_schema.schema", "autoregressive"),
        ({"response_format": FORMAT, "structured_outputs": {"regex": "a"}}, "structured_outputs.regex", "give one"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex", "cannot be used"),
        ({"structured_outputs": {"grammar": "start: ("}}, "structured_outputs.grammar", "cannot be read"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "not JSON"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"regex": "a{9}"}, "pins": {"0": 300}}, "max_tokens", "together with the pins"),
        ({"structured_outputs": {"regex": "(a|b)*"}, "max_tokens": 10**9}, "max_tokens", "the model has"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tools": TOOLS, "tool_choice": named("f")}, "tool_choice", "'f'"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {}}}, "tool_choice.function.name", "Field"),
        ({"tools": TOOLS, "parallel_tool_calls": False}, "parallel_tool_calls", "forces a call"),
        (
            {"tools": [named("f", parameters={"if": {}})], "tool_choice": "required"},
            "tool_choice",
            "tool 'f': parameters #: keyword 'if'",
        ),
        ({"pins": {"0": 1, "00": 2}}, "pins", "twice"),
        ({"pins": {"x": 1}}, "pins", "'x'"),
        ({"pins": {"9": 1}, "max_tokens": 4}, "pins", "the pin at 9"),
        ({"vllm_xargs": {"diffusion_pinned": [[0, 10**6]]}}, "vllm_xargs.diffusion_pinned", "token 1000000"),
        ({"draft_text": "a", "vllm_xargs": {"diffusion_seed_canvas": [5]}}, "draft_text", "give one"),
        (
            {"vllm_xargs": {"diffusion_seed_canvas": [10**6]}, "pins": {"0": 5}},
            "vllm_xargs.diffusion_seed_canvas",
            "the draft",
        ),
        ({"noise_level": 0.5}, "noise_level", "draft_text"),
        ({"vllm_xargs": {"diffusion_constrained": True}}, "vllm_xargs.diffusion_constrained", "not supported"),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_to_is_refused_by_name(talker: Site, body: dict[str, Any], param: str, said: str) -> None:
    named, message = refused(talker, **body)
    assert named == param
    assert said in message
    assert talker.service.engine.scheduler.idle


def test_what_takes_long_to_compile_holds_nobody_up(talker: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "SECONDS", 0.3)
    automaton = type(talker.service.lm).automaton

    def slow(lm: Any, constraint: Any, *others: Any) -> Any:
        time.sleep(1 if constraint == "slow" else 0)
        return automaton(lm, constraint, *others)

    monkeypatch.setattr(type(talker.service.lm), "automaton", slow)
    with ThreadPoolExecutor(1) as clients:
        late = clients.submit(refused, talker, structured_outputs={"regex": "slow"})
        assert create(talker, max_tokens=4).choices
        assert not late.done()
        assert late.result(10)[0] == "structured_outputs.regex"
    assert until(lambda: not talker.service.in_work.count)


def test_the_best_of_several_completions(talker: Site) -> None:
    lm, body = talker.service.lm, {"model": "default", "prompt": ["One", "Two"], "seed": 3, "max_tokens": 12}
    answer = talker.client.completions.create(**body, n=2, best_of=4, extra_body=FEW)
    wanted = []
    for text in ("One", "Two"):
        prompt = [lm.model.config.bos_token_id, *lm.tokenizer.encode(text)]
        ranked = lm.generate(prompt, seed=3, best_of=4, max_new_tokens=12, **FEW).candidates
        wanted += [lm.tokenizer.decode(each.tokens, skip_special=True) for each in ranked[:2]]
    assert [choice.text for choice in answer.choices] == wanted
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    for wrong in ({"n": 2, "best_of": 1}, {"best_of": 9}, {"best_of": 2, "stream": True}):
        response = talker.post("/v1/completions", prompt="One", **wrong)
        assert response.json()["error"]["param"] == "best_of"
