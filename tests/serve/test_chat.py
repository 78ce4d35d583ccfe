"""The server as OpenAI's own client sees it, with a model that answers for real."""

import json
import math
from typing import Any

import httpx
import openai
import pytest

from dgemma.language_model import LanguageModel
from tests.serve.conftest import PUZZLE, SLOW, Site

ASKED: Any = [{"role": "user", "content": PUZZLE}]


def test_an_answer_is_the_models_own(site: Site, lm: LanguageModel) -> None:
    right = lm.generate(PUZZLE, seed=3)
    assert lm.task
    assert lm.task.check(PUZZLE, right.text).right
    answer = site.client.chat.completions.create(model="sudoku", messages=ASKED, seed=3)
    assert answer.choices[0].message.content == right.text
    assert answer.choices[0].finish_reason == "stop"
    usage = answer.usage.to_dict()
    assert usage["prompt_tokens"] == right.prompt_tokens
    assert usage["completion_tokens"] == len(right.tokens)
    assert usage["total_tokens"] == right.prompt_tokens + len(right.tokens)
    assert usage["diffusion"]["denoising_steps"] == sum(right.steps)
    assert usage["diffusion"]["converged"]
    assert usage["diffusion"]["seed"] == 3
    parts = [{"type": "text", "text": PUZZLE[:20]}, {"type": "text", "text": PUZZLE[20:]}]
    again = site.client.chat.completions.create(model="default", messages=[{"role": "user", "content": parts}], seed=3)
    assert again.choices[0].message.content == right.text
    assert again.usage.prompt_tokens_details.cached_tokens == 90, "the page that both prompts begin with"


def test_a_stream_is_the_same_text_and_ends_with_usage(site: Site, lm: LanguageModel) -> None:
    stream = site.client.chat.completions.create(
        model="sudoku", messages=ASKED, seed=5, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    right = lm.generate(PUZZLE, seed=5)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == right.text
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["stop"]
    assert last.choices == []
    assert last.usage.completion_tokens == len(right.tokens)


def test_n_choices_have_seeds_of_their_own(site: Site, lm: LanguageModel) -> None:
    options: Any = {"max_denoising_steps": 1}
    answer = site.client.chat.completions.create(
        model="sudoku", messages=ASKED, seed=2**64 - 1, n=2, extra_body=options
    )
    wanted = [lm.generate(PUZZLE, seed=seed, **options) for seed in (2**64 - 1, 0)]
    assert [choice.message.content for choice in answer.choices] == [each.text for each in wanted]
    assert answer.usage.prompt_tokens == wanted[0].prompt_tokens
    assert answer.usage.completion_tokens == sum(len(each.tokens) for each in wanted)


def test_temperature_scales_or_makes_greedy(site: Site, lm: LanguageModel) -> None:
    few: Any = {"max_denoising_steps": 3}
    for temperature, options in ((0, {"greedy": True}), (2, {"t_min": 0.8, "t_max": 1.6})):
        answer = site.client.chat.completions.create(
            model="sudoku", messages=ASKED, seed=1, temperature=temperature, extra_body=few
        )
        assert answer.choices[0].message.content == lm.generate(PUZZLE, seed=1, **few, **options).text


def test_a_stop_string_ends_the_answer(site: Site, lm: LanguageModel) -> None:
    first, second, *_ = lm.generate(PUZZLE, seed=1).text.split("\n")
    answer = site.client.chat.completions.create(model="sudoku", messages=ASKED, seed=1, stop=["zzz", "\n" + second])
    assert answer.choices[0].message.content == first
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == len(first) + 1 + len(second)


def test_logprobs_are_those_of_the_causal_mode(site: Site, lm: LanguageModel) -> None:
    answer = site.client.chat.completions.create(
        model="sudoku", messages=ASKED, seed=1, logprobs=True, top_logprobs=3, max_tokens=12
    )
    entries = answer.choices[0].logprobs.content
    said = lm.generate(PUZZLE, seed=1, max_new_tokens=12)
    assert [entry.token for entry in entries] == [lm.tokenizer.decode([token]) for token in said.tokens]
    for entry, wanted in zip(entries, lm.log_probabilities(PUZZLE, said.tokens), strict=True):
        assert math.isclose(entry.logprob, wanted, abs_tol=1e-3)
        assert bytes(entry.bytes).decode() == entry.token
        values = [other.logprob for other in entry.top_logprobs]
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
        assert values[0] >= entry.logprob - 1e-6


def test_drafts_tell_every_step_and_an_ordinary_client_passes_over_them(site: Site, lm: LanguageModel) -> None:
    stream = site.client.chat.completions.create(
        model="sudoku", messages=ASKED, seed=1, stream=True, extra_body={"draft": True}
    )
    chunks = list(stream)
    right = lm.generate(PUZZLE, seed=1)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == right.text
    events = [chunk.to_dict()["dgemma"] for chunk in chunks if not chunk.choices]
    assert [e["event"] for e in events if e["event"] != "step"] == ["prefilled", "block", "finished"]
    steps = [e for e in events if e["event"] == "step"]
    assert [e["step"] for e in steps][-1] == sum(right.steps)
    assert {len(e[name]) for e in steps for name in ("tokens", "canvas", "entropy", "accepted")} == {90}
    assert "".join(steps[-1]["tokens"]).startswith(right.text)
    assert (events[-1]["text"], events[-1]["reason"]) == (right.text, "stop")
    assert events[-1]["usage"]["diffusion"]["denoising_steps"] == sum(right.steps)
    (block,) = (e for e in events if e["event"] == "block")
    assert block["ids"] == right.tokens
    assert "".join(block["texts"]).startswith(right.text)


@pytest.mark.parametrize("seed", range(4))
def test_drafts_tell_what_each_token_brings(talker: Site, seed: int) -> None:
    asked: Any = [{"role": "user", "content": "Tell me of Oslo."}]
    stream = talker.client.chat.completions.create(
        model="default", messages=asked, seed=seed, max_tokens=48, stream=True, extra_body={"draft": True}
    )
    events = [chunk.to_dict()["dgemma"] for chunk in stream if not chunk.choices]
    ids = [token for e in events if e["event"] == "block" for token in e["ids"]]
    texts = [text for e in events if e["event"] == "block" for text in e["texts"]]
    decode = talker.service.lm.tokenizer.decode
    assert len(ids) == len(texts) == events[-1]["usage"]["completion_tokens"]
    assert decode(ids).startswith("".join(texts))  # of a character that the limit cuts, nothing is told
    for at, text in enumerate(texts):
        if text and "\ufffd" not in text:
            before = "".join(texts[:at])
            assert decode(ids[: at + 1]) == before + text


def test_the_autoregressive_mode_beside_a_canvas(site: Site, lm: LanguageModel) -> None:
    body: Any = {"autoregressive": True, "max_tokens": 10}
    answer = site.client.chat.completions.create(model="sudoku", messages=ASKED, extra_body=body)
    wanted = lm.generate(PUZZLE, autoregressive=True, max_new_tokens=10)
    assert answer.choices[0].message.content == wanted.text
    assert answer.choices[0].finish_reason == wanted.finish_reason
    assert answer.usage.to_dict()["diffusion"]["denoising_steps"] == len(wanted.tokens)
    assert site.ask(**body, max_denoising_steps=3).json()["error"]["param"] == "max_denoising_steps"
    assert site.ask(**body, n=2).json()["error"]["param"] == "n"


def test_completions_take_text_lists_and_tokens(site: Site, lm: LanguageModel) -> None:
    few: Any = {"max_denoising_steps": 2}

    def wanted(text: str) -> str:
        tokens = [lm.model.config.bos_token_id, *lm.tokenizer.encode(text)]
        said = lm.generate(tokens, seed=7, max_new_tokens=30, **few).tokens
        return lm.tokenizer.decode(said, skip_special=True)

    create = site.client.completions.create
    options: Any = {"model": "sudoku", "seed": 7, "max_tokens": 30, "extra_body": few}
    answer = create(prompt=["12", "3"], **options)
    assert [choice.text for choice in answer.choices] == [wanted("12"), wanted("3")]
    assert answer.usage.prompt_tokens == 5
    tokens = site.post("/tokenize", prompt="12").json()
    assert create(prompt=tokens["tokens"], **options).choices[0].text == wanted("12")
    assert "".join(c.choices[0].text for c in create(prompt="3", stream=True, **options)) == wanted("3")
    for field in ("logprobs", "echo"):
        with pytest.raises(openai.BadRequestError) as error:
            create(prompt="3", **options, **{field: True})
        assert error.value.param == field


def test_models_tokens_and_the_schema(site: Site, lm: LanguageModel) -> None:
    (model,) = site.client.models.list().data
    assert model.id == "sudoku"
    told = model.to_dict()["dgemma"]
    assert (told["canvas_length"], told["thinking"], told["tools"]) == (90, False, False)
    assert told["defaults"]["entropy_bound"] == lm.defaults.entropy_bound
    assert site.client.models.retrieve("sudoku").id == "sudoku"
    tokens = site.post("/tokenize", messages=ASKED).json()["tokens"]
    assert tokens == lm.tokens(PUZZLE)
    assert site.post("/detokenize", tokens=tokens[-4:]).json()["prompt"] == lm.tokenizer.decode(tokens[-4:])
    document = httpx.get(f"{site.url}/openapi.json").json()
    fields = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert "422" not in json.dumps(document["paths"])
    assert fields["n"]["maximum"] == 8
    assert fields["temperature"]["anyOf"][0]["maximum"] == 2
    assert "nats" in fields["entropy_bound"]["description"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"foo": 1}, "foo"),
        ({"n": 9}, "n"),
        ({"n": "2"}, "n"),
        ({"seed": -1}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**9}, "max_tokens"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": 0.5, "t_min": 0.1}, "temperature"),
        ({"t_min": 0.9}, "t_min"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"top_p": 0.9}, "top_p"),
        ({"logit_bias": {"1": 2}}, "logit_bias"),
        ({"response_format": {"type": "json"}}, "response_format.type"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"draft": True}, "draft"),
        ({"stream_options": {}}, "stream_options"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs.enable_thinking"),
        ({"chat_template_kwargs": {"x": True}}, "chat_template_kwargs.x"),
        ({"vllm_xargs": {"diffusion_pinned": [1]}}, "vllm_xargs.diffusion_pinned"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "no puzzle"}]}, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0]",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(site: Site, body: dict[str, Any], param: str) -> None:
    response = site.post(**({"messages": ASKED} | body))
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert error["message"]


def test_neutral_values_and_aliases_are_taken(site: Site, lm: LanguageModel) -> None:
    neutral = {"top_p": 1, "presence_penalty": 0, "logit_bias": {}, "top_k": -1, "response_format": {"type": "text"}}
    answer = site.ask(**neutral, seed=1, user="u", vllm_xargs={"diffusion_max_steps": 2}, **SLOW).json()
    assert answer["usage"]["diffusion"]["denoising_steps"] == 2
    with pytest.raises(openai.NotFoundError) as error:
        site.client.chat.completions.create(model="other", messages=ASKED)
    assert (error.value.code, error.value.param) == ("model_not_found", "model")
