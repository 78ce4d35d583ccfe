"""POST /v1/score: the figures of `LanguageModel.score`, whoever else is served."""

from typing import Any

import pytest

from dgemma.scoring import PLACE, Question
from tests.serve.conftest import Site
from tests.serve.test_http import until

CHOICES = ["yes", "no", "perhaps"]


def test_scores_are_those_of_the_model(talker: Site) -> None:
    lm = talker.service.lm
    prompts, template = ["Is it?", "Was it so?"], f"It is {PLACE}."
    answer = talker.post("/v1/score", prompt=prompts, template=template, choices=CHOICES, steps=2, seed=5).json()
    tokens = [[lm.model.config.bos_token_id, *lm.tokenizer.encode(prompt)] for prompt in prompts]
    wanted = lm.score_all([Question(prompt, template, CHOICES) for prompt in tokens], 2, seed=5)
    for told, scores in zip(answer["data"], wanted, strict=True):
        assert [choice["text"] for choice in told["choices"]] == CHOICES
        assert [c["probability"] for c in told["choices"]] == pytest.approx(scores.probabilities, abs=1e-6)
        assert told["mass"] == pytest.approx(scores.mass, rel=1e-5)
    assert answer["usage"]["prompt_tokens"] == sum(map(len, tokens))

    messages = [{"role": "user", "content": "Is it?"}]
    body: dict[str, Any] = {"messages": messages, "choices": CHOICES}
    told = talker.post("/v1/score", template=[PLACE, template], **body).json()["data"]
    for each, form in zip(told, (PLACE, template), strict=True):
        assert each["mass"] == pytest.approx(lm.score(messages, form, CHOICES).mass, rel=1e-5)
    assert until(lambda: not talker.service.in_work.count)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"template": "none"}, "template"),
        ({"template": [PLACE] * 3, "prompt": ["a", "b"]}, "prompt"),
        ({"template": PLACE + "word " * 40}, "template"),
        ({"choices": ["a", "a"]}, "choices"),
        ({"choices": []}, "choices"),
        ({"choices": ["a", 1]}, "choices[1]"),
        ({"steps": 0}, "steps"),
        ({"prompt": []}, "prompt"),
        ({"messages": [{"role": "user", "content": "x"}]}, "prompt"),
        ({"chat_template_kwargs": {}}, "chat_template_kwargs"),
        ({"temperature": 1}, "temperature"),
    ],
)
def test_what_cannot_be_asked_is_refused_by_name(talker: Site, body: dict[str, Any], param: str) -> None:
    response = talker.post("/v1/score", **{"prompt": "x", "template": PLACE, "choices": CHOICES, **body})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
