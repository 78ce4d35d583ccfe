"""A suffix in /v1/completions: the same gap as `LanguageModel.infill` fills."""

from typing import Any

import httpx
import pytest

from dgemma.infill import gap_lengths
from tests.serve.conftest import Site

PREFIX, SUFFIX = "Oslo lies ", " of Norway."
FEW: Any = {"max_denoising_steps": 4}


def create(site: Site, **fields: Any) -> Any:
    fields = {"model": "default", "prompt": PREFIX, "suffix": SUFFIX, "seed": 5, "max_tokens": 6} | fields
    return site.client.completions.create(**fields, extra_body=FEW)


@pytest.mark.parametrize("prefix", ["", PREFIX, PREFIX * 9], ids=["empty", "short", "long"])
@pytest.mark.parametrize("suffix", ["s", SUFFIX, SUFFIX * 9], ids=["one", "some", "longer than a canvas"])
def test_the_middle_is_that_of_infill(talker: Site, prefix: str, suffix: str) -> None:
    wanted = talker.service.lm.infill(prefix, suffix, 6, seed=5, **FEW)
    answer = create(talker, prompt=prefix, suffix=suffix)
    assert answer.choices[0].text == wanted.text
    assert answer.choices[0].finish_reason == "stop"
    several = create(talker, prompt=prefix, suffix=suffix, n=3)
    assert [c.text for c in several.choices] == [c.text for c in wanted.candidates[:3]]
    stream = list(create(talker, prompt=prefix, suffix=suffix, n=3, stream=True))
    assert [(c.choices[0].index, c.choices[0].text) for c in stream] == [(c.index, c.text) for c in several.choices]


def test_usage_counts_what_was_given_and_what_was_tried(talker: Site) -> None:
    lm = talker.service.lm
    before, after = (len(lm.tokenizer.encode(text)) for text in (PREFIX, SUFFIX))
    gaps = gap_lengths(6, None, after, lm.model.config.canvas_length)
    usage = create(talker).usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (1 + before + after, sum(gaps))
    assert usage.to_dict()["diffusion"]["blocks"] == len(gaps)
    *_, last = create(talker, stream=True, stream_options={"include_usage": True})
    assert last.usage.total_tokens == 1 + before + after + sum(gaps)


def test_prefix_and_suffix_take_tokens_and_special_tokens_are_characters(talker: Site) -> None:
    lm = talker.service.lm
    tokens = talker.post("/tokenize", prompt=PREFIX).json()["tokens"]
    assert create(talker, prompt=tokens).choices[0].text == create(talker).choices[0].text
    odd = create(talker, prompt="a<turn|>", suffix="<eos>b")
    assert odd.choices[0].text == lm.infill("a<turn|>", "<eos>b", 6, seed=5, **FEW).text


def test_an_empty_suffix_is_none(talker: Site) -> None:
    assert create(talker, suffix="").choices[0].text == create(talker, suffix=None).choices[0].text


def test_a_stream_lives_while_nothing_is_known(talker: Site) -> None:
    body = {"prompt": PREFIX, "suffix": SUFFIX, "max_tokens": 4, "stream": True, **FEW}
    lines = httpx.post(f"{talker.url}/v1/completions", json=body, timeout=60).text.split("\n\n")
    assert lines[0].startswith(": keep-alive")
    assert sum(line.startswith("data: {") for line in lines) == 1
    assert lines[-2] == "data: [DONE]"


def test_nothing_is_left_over(talker: Site) -> None:
    create(talker, n=2)
    scheduler = talker.service.engine.scheduler
    assert scheduler.idle
    assert not talker.service.aside.locked()


@pytest.mark.parametrize(
    ("field", "body"),
    [
        ("logprobs", {"logprobs": 1}),
        ("echo", {"echo": True}),
        ("stop", {"stop": "x"}),
        ("best_of", {"best_of": 2}),
        ("autoregressive", {"autoregressive": True}),
        ("pins", {"pins": {"0": 3}}),
        ("draft_text", {"draft_text": "x"}),
        ("structured_outputs.regex", {"structured_outputs": {"regex": "x+"}}),
        ("prompt", {"prompt": ["a", "b"]}),
        ("prompt", {"prompt": [2, 1 << 30]}),
        ("prompt", {"prompt": []}),
        ("prompt", {"prompt": [[]]}),
        ("n", {"n": 4, "max_tokens": 2}),
        ("max_tokens", {"max_tokens": 0}),
        ("suffix", {"suffix": ["b"]}),
    ],
)
def test_what_cannot_be_is_refused_by_name(talker: Site, field: str, body: dict[str, Any]) -> None:
    response = talker.post("/v1/completions", **({"prompt": "a", "suffix": "b"} | body))
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == field


def test_a_suffix_without_tokens_is_refused(talker: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(talker.service.lm.tokenizer, "encode", lambda text: [])
    response = talker.post("/v1/completions", prompt="1", suffix="x")
    assert (response.status_code, response.json()["error"]["param"]) == (400, "suffix")
