"""Thoughts, calls and stop strings, with texts that are given: streams and whole answers must agree."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.serve.conftest import Site

ASKED: Any = [{"role": "user", "content": "What is the weather in Oslo?"}]
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CALL = '<|tool_call>call:weather{city:<|"|>Oslo<|"|>}<tool_call|>'


def both(site: Site, **body: Any) -> tuple[dict[str, Any], str]:
    """Message and finish reason; of a stream put together, and of a whole answer, which must be equal."""
    create = site.client.chat.completions.create
    whole = create(model="default", messages=ASKED, **body).choices[0]
    message = {name: getattr(whole.message, name, None) for name in ("content", "reasoning_content", "tool_calls")}
    calls = [(call.function.name, json.loads(call.function.arguments)) for call in message["tool_calls"] or ()]
    message = {"content": message["content"] or "", "reasoning": message["reasoning_content"] or "", "calls": calls}

    said: dict[str, Any] = {"content": "", "reasoning": "", "calls": []}
    reason = ""
    for chunk in create(model="default", messages=ASKED, stream=True, **body):
        delta = chunk.choices[0].delta
        said["content"] += delta.content or ""
        said["reasoning"] += getattr(delta, "reasoning_content", None) or ""
        for call in delta.tool_calls or ():
            assert call.index == len(said["calls"])
            assert call.id.startswith("call_")
            said["calls"].append((call.function.name, json.loads(call.function.arguments)))
        reason = chunk.choices[0].finish_reason or reason
    assert (said, reason) == (message, whole.finish_reason)
    return message, reason


def test_thoughts_are_apart_and_not_searched_for_stops(talker: Site, say: Callable[..., Any]) -> None:
    cancelled = say("<|channel>thought\nIs it dry", "? STOP no.\n<channel|>It is dry. ST", "OP and more", "<turn|>")
    message, reason = both(talker, stop="STOP", extra_body={"chat_template_kwargs": {"enable_thinking": True}})
    assert message == {"content": "It is dry. ", "reasoning": "Is it dry? STOP no.", "calls": []}
    assert reason == "stop"
    assert len(cancelled) >= 2, "of each request, the job is cancelled"


def test_what_might_become_a_stop_string_is_held_but_not_lost(talker: Site, say: Callable[..., Any]) -> None:
    say("One ST", "OLE and ST", reason="length")
    assert both(talker, stop=["STOP"]) == ({"content": "One STOLE and ST", "reasoning": "", "calls": []}, "length")


def test_calls_become_tool_calls(talker: Site, say: Callable[..., Any]) -> None:
    say("Let me see." + CALL[:20], CALL[20:] + CALL + "<|tool_response>")
    message, reason = both(talker, tools=TOOLS)
    call = ("weather", {"city": "Oslo"})
    assert message == {"content": "Let me see.", "reasoning": "", "calls": [call, call]}
    assert reason == "tool_calls"


def test_tool_choice_none_hides_the_tools_and_calls_are_text(talker: Site, say: Callable[..., Any]) -> None:
    say(CALL + "<turn|>")
    message, reason = both(talker, tools=TOOLS, tool_choice="none")
    assert (message["content"], message["calls"], reason) == (CALL, [], "stop")
    sizes = []
    for choice in ("auto", "none"):
        body = {"messages": ASKED, "tools": TOOLS, "tool_choice": choice}
        sizes.append(talker.post(**body).json()["usage"]["prompt_tokens"])
    assert sizes[0] > sizes[1]


def test_a_call_and_its_answer_are_a_conversation(talker: Site) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    history = [*ASKED, {"role": "assistant", "content": None, "tool_calls": [call]}]
    answered = {"role": "tool", "tool_call_id": "c1", "content": "<turn|> rain"}
    response = talker.post(messages=[*history, answered], tools=TOOLS, max_tokens=4, max_denoising_steps=2)
    assert response.status_code == 200, response.text
    lost = talker.post(messages=[*history, {**answered, "tool_call_id": "c2"}], tools=TOOLS)
    assert lost.json()["error"]["param"] == "messages[2]"


def test_reasoning_tokens_and_a_thought_without_an_answer(talker: Site, say: Callable[..., Any]) -> None:
    say("<|channel>thought\nSo", reason="length")
    answer = talker.post(messages=ASKED).json()
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "", "reasoning_content": "So"}
    assert answer["choices"][0]["finish_reason"] == "length"
    usage = answer["usage"]
    assert usage["completion_tokens_details"]["reasoning_tokens"] == usage["completion_tokens"] > 0
    assert usage["diffusion"]["tokens_per_forward"] == pytest.approx(usage["completion_tokens"] / 3, abs=1e-3)


def test_users_cannot_write_special_tokens(talker: Site) -> None:
    def count(text: str) -> int:
        tokens = talker.post("/tokenize", messages=[{"role": "user", "content": text}]).json()["tokens"]
        return tokens.count(talker.service.lm.tokenizer.id("<turn|>"))

    assert count("hello") == count("<turn|>") == 1
