"""Images and video over HTTP: data URLs in any order, nothing else unless it is allowed, few at a time."""

import threading
from collections.abc import Iterator
from http.server import HTTPServer
from typing import Any

import pytest

from dgemma.language_model import LanguageModel
from tests.media.test_images import noise, saved
from tests.media.test_media_sources import Handler
from tests.media.test_prompt import text, url, user
from tests.media.test_video import clip
from tests.random_models import seeing_lm
from tests.serve.conftest import Site, serving


@pytest.fixture(scope="module")
def eyes() -> LanguageModel:
    return seeing_lm()


@pytest.fixture(scope="module")
def seeing(eyes: LanguageModel) -> Iterator[Site]:
    with serving(eyes, body_limit=8 << 20) as site:
        yield site


def shown(seed: int = 0, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url(saved(noise(60, 40, seed))), **more}}


def asked(*parts: dict[str, Any], **body: Any) -> dict[str, Any]:
    return {"messages": user(*parts), "seed": 4, "max_tokens": 20, **body}


def test_an_image_is_answered_as_in_python(seeing: Site, eyes: LanguageModel) -> None:
    for parts in ([shown(), text("the cat")], [text("the"), shown(1), text("and"), shown(), shown(1)]):
        answer = seeing.post(**asked(*parts)).json()
        mine = eyes.generate(user(*parts), seed=4, max_new_tokens=20)
        assert answer["choices"][0]["message"]["content"] == mine.text
        assert answer["usage"]["prompt_tokens"] == mine.prompt_tokens > 70
    assert seeing.post("/v1/models").status_code == 405
    card = seeing.client.models.retrieve("seeing").model_extra
    assert card["dgemma"]["images"] is True


def test_openais_client_and_a_stream(seeing: Site, eyes: LanguageModel) -> None:
    parts = [shown(detail="low"), text("the cat")]
    stream = seeing.client.chat.completions.create(
        model="seeing", messages=user(*parts), seed=4, max_tokens=20, stream=True
    )
    said = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert said == eyes.generate(user(*parts), seed=4, max_new_tokens=20).text


def test_a_conversation_finds_its_image_in_the_cache(seeing: Site) -> None:
    first = [*user(shown(7), text("the cat")), {"role": "assistant", "content": "sat"}, *user(text("and the dog?"))]
    seeing.post(**{**asked(), "messages": first})
    again = seeing.post(**{**asked(), "messages": first}).json()["usage"]
    other = [*user(shown(8), text("the cat")), *first[1:]]
    fresh = seeing.post(**{**asked(), "messages": other}).json()["usage"]
    assert again["prompt_tokens"] == fresh["prompt_tokens"]
    assert again["prompt_tokens_details"]["cached_tokens"] > 70
    assert fresh["prompt_tokens_details"]["cached_tokens"] == 0


def test_logprobs_and_left_to_right_see_it_too(seeing: Site) -> None:
    logs = []
    for seed in (0, 1):
        answer = seeing.post(
            **asked(shown(seed), text("the"), logprobs=True, autoregressive=True, temperature=0)
        ).json()
        logs.append([entry["logprob"] for entry in answer["choices"][0]["logprobs"]["content"]])
        best = answer["choices"][0]["logprobs"]["content"]
        assert best
    assert logs[0] != logs[1]


def test_a_video_and_budgets(seeing: Site) -> None:
    video = {"type": "video_url", "video_url": {"url": url(clip([i / 2 for i in range(5)]), "video/x-matroska")}}
    size = lambda **media: seeing.post(**asked(video, shown(), text("the"), **media)).json()["usage"]["prompt_tokens"]  # noqa: E731
    usual = size()
    assert size(media={"video_frames": 1}) < usual - 100
    assert size(media={"image_tokens": 140}) > usual + 50
    for media, param in (({"image_tokens": 3}, "media.image_tokens"), ({"size": 3}, "media.size")):
        response = seeing.post(**asked(shown(), media=media))
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    idle = seeing.post(**asked(text("the"), media={"image_tokens": 140}))
    assert "no effect" in idle.json()["error"]["message"]


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("/etc/passwd", "a data: URL is expected"),
        ("file:///etc/passwd", "a data: URL is expected"),
        ("http://127.0.0.1:1/a.png", "nothing is fetched from '127.0.0.1'"),
        ("https://example.org/a.png", "nothing is fetched from 'example.org'"),
        ("data:image/png;base64,aGVsbG8=", "is not an image of a known format"),
        ("data:image/png;base64,%%", "not base64"),
    ],
)
@pytest.mark.parametrize("kind", ["image_url", "image"])
def test_what_is_refused(seeing: Site, kind: str, given: str, why: str) -> None:
    part = {"type": kind, kind: {"url": given} if kind == "image_url" else given}
    response = seeing.post(**asked(part, text("the")))
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "invalid_value")
    assert error["param"].startswith("messages[0].content[0]")
    assert why in error["message"]


def test_a_model_without_a_tower_says_so(site: Site) -> None:
    error = site.post(**asked(shown(), text("the"))).json()["error"]
    assert "no vision tower" in error["message"]
    card = site.client.models.retrieve("sudoku").model_extra
    assert card["dgemma"]["images"] is False


def test_many_images_in_few_bytes_are_stopped_early(seeing: Site, eyes: LanguageModel, monkeypatch: Any) -> None:
    from dgemma.media import prompt

    opened = []
    picture_of = prompt.picture_of
    monkeypatch.setattr(prompt, "picture_of", lambda *args: opened.append(1) or picture_of(*args))
    tiny = {"type": "image_url", "image_url": {"url": url(saved(noise(1, 1)))}}
    response = seeing.post(**asked(*[tiny] * 3000))
    assert response.status_code == 400
    assert "positions" in response.json()["error"]["message"]
    assert len(opened) < 130


def test_scores_and_infill_refuse_them(seeing: Site) -> None:
    response = seeing.post("/v1/score", messages=user(shown()), template="<choice>", choices=["a", "b"])
    assert (response.status_code, response.json()["error"]["param"]) == (400, "messages")
    tokens = seeing.post("/tokenize", messages=user(shown(), text("the"))).json()
    assert tokens["count"] > 64


def test_remote_images_only_from_hosts_that_are_named(eyes: LanguageModel) -> None:
    class Pictures(Handler):
        def do_GET(self) -> None:  # noqa: N802
            body = saved(noise(60, 40))
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = HTTPServer(("127.0.0.1", 0), Pictures)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        host = f"127.0.0.1:{server.server_port}"
        remote = {"type": "image_url", "image_url": {"url": f"http://{host}/a.png"}}
        with serving(eyes, media_hosts=(host,)) as site:
            answer = site.post(**asked(remote, text("the cat"))).json()
            sent = site.post(**asked(shown(), text("the cat"))).json()
            other = site.post(**asked({"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}}))
        assert answer["choices"] == sent["choices"]
        assert other.status_code == 400
        assert f"only {host}" in other.json()["error"]["message"]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
