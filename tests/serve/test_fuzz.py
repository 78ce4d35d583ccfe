"""Bodies drawn from the served OpenAPI document, sound and broken: each is answered, or refused by a field's name."""

import json
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.serve.conftest import Site
from tests.serve.test_http import until

ENDPOINTS = {
    "/v1/chat/completions": ("ChatRequest", 100),
    "/v1/completions": ("CompletionRequest", 60),
    "/v1/score": ("ScoreRequest", 100),
    "/tokenize": ("TokenizeRequest", 60),
    "/detokenize": ("DetokenizeRequest", 30),
}
"""The schema of an endpoint's body, and how many of them are sent."""

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=6
)
roles = st.sampled_from(["system", "user", "user", "assistant"])
text_part = st.fixed_dictionaries({"type": st.just("text"), "text": st.text(max_size=9)})
content = st.text(min_size=1, max_size=20) | st.lists(text_part, min_size=1, max_size=3)
conversation = st.lists(st.fixed_dictionaries({"role": roles, "content": content}), min_size=1, max_size=3)
tool = st.fixed_dictionaries(
    {
        "type": st.just("function"),
        "function": st.fixed_dictionaries({"name": st.from_regex(r"\A[a-z]{1,6}\Z"), "description": st.text()}),
    }
)
few = st.integers(1, 2)
OWN: dict[str, st.SearchStrategy[Any]] = {
    # What the schema leaves open, or allows in an amount that a test has no time for.
    "model": st.sampled_from(["default", "talker", "default"]),
    "messages": conversation | st.lists(st.dictionaries(st.text(), anything, max_size=3), min_size=1, max_size=2),
    "tools": st.none() | st.lists(tool, max_size=2) | st.lists(st.dictionaries(st.text(), anything), max_size=2),
    "prompt": st.text(max_size=30)
    | st.lists(st.integers(-1, 200), max_size=9)
    | st.lists(st.text(max_size=9), max_size=3),
    "n": st.integers(1, 3),
    "max_tokens": st.integers(1, 20),
    "max_completion_tokens": st.integers(1, 20),
    "max_denoising_steps": few,
    "steps": few,
    "template": st.sampled_from(["<choice>", "It is <choice>.", "<choice><choice>", ["<choice>!"], "none"]),
    "choices": st.lists(st.text(max_size=3), min_size=1, max_size=3, unique=True),
    "diffusion_max_steps": few,
}


def values(schema: dict[str, Any], known: dict[str, Any]) -> st.SearchStrategy[Any]:
    """What a schema allows; known: the document's named schemas."""
    if "$ref" in schema:
        return values(known[schema["$ref"].rpartition("/")[2]], known)
    if "anyOf" in schema:
        return st.one_of([values(branch, known) for branch in schema["anyOf"]])
    if "enum" in schema or "const" in schema:
        return st.sampled_from(schema.get("enum") or [schema["const"]])
    match schema.get("type"):
        case "object" if "properties" in schema:
            return objects(schema, known)
        case "object":
            return st.dictionaries(st.text(), anything, max_size=3)
        case "array":
            inner = values(schema.get("items", {}), known)
            return st.lists(inner, min_size=schema.get("minItems", 0), max_size=min(4, schema.get("maxItems", 4)))
        case "string":
            return st.text(min_size=schema.get("minLength", 0), max_size=min(20, schema.get("maxLength", 20)))
        case "integer":
            highest = schema.get("exclusiveMaximum", 1 << 70) - 1
            return st.integers(schema.get("minimum"), min(highest, schema.get("maximum", highest)))
        case "number":
            return st.floats(schema.get("minimum"), schema.get("maximum"), allow_nan=False, allow_infinity=False)
        case "boolean":
            return st.booleans()
        case "null":
            return st.none()
    return anything


def objects(schema: dict[str, Any], known: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """What is required, and a few of the other properties: of many, some pair always contradicts itself."""
    required = schema.get("required", [])
    of = {n: OWN[n] if n in OWN else values(inner, known) for n, inner in schema["properties"].items()}
    others = st.lists(st.sampled_from(sorted(of.keys() - set(required)) or required), max_size=4, unique=True)
    return others.flatmap(lambda chosen: st.fixed_dictionaries({name: of[name] for name in [*required, *chosen]}))


@st.composite
def bodies(draw: st.DrawFn, sound: st.SearchStrategy[dict[str, Any]], names: list[str]) -> dict[str, Any]:
    """Sound ones, and in half of the cases ones with a field of any content, one too many or one too few."""
    body = draw(sound)
    match draw(st.sampled_from(["sound", "sound", "sound", "content", "more", "less"])):
        case "content":
            body[draw(st.sampled_from(names))] = draw(anything)
        case "more":
            body[draw(st.text())] = draw(anything)
        case "less" if body:
            del body[draw(st.sampled_from(sorted(body)))]
    # The defaults would take their time.
    if "max_tokens" in names and "max_completion_tokens" not in body:
        body.setdefault("max_tokens", 4)
    if "max_tokens" in names and not {"vllm_xargs", "autoregressive"} & body.keys():
        body.setdefault("max_denoising_steps", 2)
    return body


@pytest.mark.parametrize("path", ENDPOINTS)
def test_every_body_is_answered_or_refused_by_name(talker: Site, path: str) -> None:
    known = httpx.get(f"{talker.url}/openapi.json").json()["components"]["schemas"]
    name, count = ENDPOINTS[path]
    fields = sorted(known[name]["properties"])
    statuses: list[int] = []
    with httpx.Client(base_url=talker.url, timeout=30) as client:

        @settings(
            max_examples=count,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @given(bodies(objects(known[name], known), fields))
        def ask(body: dict[str, Any]) -> None:
            sent = json.dumps(body)
            response = client.post(path, content=sent, headers={"Content-Type": "application/json"})
            statuses.append(response.status_code)
            if response.status_code == 200:
                assert '"server_error"' not in response.text, sent
                return
            assert 400 <= response.status_code < 500, (sent, response.text)
            assert response.json().keys() == {"error"}
            error = response.json()["error"]
            assert error.keys() == {"message", "type", "param", "code"}
            assert error["message"], sent
            assert error["type"] == "invalid_request_error", (sent, error)
            assert error["param"] is not None, (sent, error)
            assert any(error["param"].startswith(field) for field in [*fields, *body]), (sent, error)

        ask()
    assert min(statuses) == 200
    assert statuses.count(200) >= 5, "too few are sound to say anything"
    assert any(status >= 400 for status in statuses)
    service = talker.service
    assert until(lambda: service.engine.scheduler.idle and not service.in_work.count)
