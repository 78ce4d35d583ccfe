"""What lies around the answers: limits, keys, metrics, clients that leave, many at once."""

import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from dgemma.engine.scheduler import Limits
from dgemma.language_model import LanguageModel
from dgemma.serve.server import bind, hosts
from tests.serve.conftest import PUZZLE, SLOW, Site, serving

HALF = b'{"messages": [{"role": "user", "content": "\\ud800"}]}'  # of a surrogate pair
JSON = {"Content-Type": "application/json"}


def until(true: Callable[[], bool], seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.02)
    return true()


def test_bodies_that_are_none(site: Site) -> None:
    path = f"{site.url}/v1/chat/completions"
    for content in (b"{", b"", b"[]", b"\xff", b"[" * 100_000, b'{"model": "\\ud800"}', HALF, b'{"\\ud800": 1}'):
        response = httpx.post(path, content=content, headers=JSON)
        assert response.status_code == 400, content[:9]
        assert response.json()["error"]["type"] == "invalid_request_error"
        assert re.fullmatch(r"[0-9a-f]{32}", response.headers["x-request-id"])
    # A page elsewhere can send this without asking first; it must not be read as JSON.
    assert httpx.post(path, content=b'{"messages": []}', headers={"Content-Type": "text/plain"}).status_code == 400
    assert httpx.get(path).status_code == 405
    assert httpx.get(f"{site.url}/nothing").json()["error"]["message"] == "GET /nothing: Not Found"


def test_a_handlers_bug_is_a_500_with_its_id(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(type(site.service), "describe", lambda service: {}["bug"])
    response = httpx.get(f"{site.url}/v1/models")
    assert response.status_code == 500
    assert response.headers["x-request-id"] in response.json()["error"]["message"]
    assert response.headers["x-request-id"] in caplog.text
    assert "bug" not in response.text


def test_limits_and_keys(lm: LanguageModel) -> None:
    with serving(lm, key="secret", body_limit=2000, hosts=hosts("127.0.0.1"), quiet=True) as site:
        key = {"Authorization": "Bearer secret"}
        for path in ("/v1/models", "/metrics"):
            for headers in (
                {},
                {"Authorization": "Bearer secre"},
                {"Authorization": "Bearer sécret"},
                {"Authorization": "secret"},
            ):
                raw = {name: value.encode() for name, value in headers.items()}
                response = httpx.get(site.url + path, headers=raw)
                assert response.status_code == 401
                assert response.json()["error"]["code"] == "invalid_api_key"
            assert httpx.get(site.url + path, headers=key).status_code == 200
        assert httpx.get(f"{site.url}/health").json() == {"status": "ok"}
        assert (
            httpx.get(f"{site.url}/health", headers={"Host": "evil.example:80"}).json()["error"]["code"]
            == "invalid_host"
        )
        assert httpx.get(f"{site.url}/health", headers={"Host": "localhost"}).status_code == 200

        chunks = (b" " * 1000 for _ in range(6))
        for content in (b" " * 2001, b" " * 100_000, chunks):
            response = httpx.post(f"{site.url}/tokenize", content=content, headers=JSON | key)
            assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")
    assert hosts("0.0.0.0") is None


def test_an_address_in_use_is_named() -> None:
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1, port {port}: Address already in use"):
            bind("127.0.0.1", port)


def test_while_loading_health_answers_and_the_rest_is_503() -> None:
    with serving(None) as site:
        response = httpx.get(f"{site.url}/health")
        assert (response.status_code, response.json()) == (503, {"status": "loading"})
        for response in (site.ask(), httpx.get(f"{site.url}/v1/models")):
            assert (response.status_code, response.json()["error"]["code"]) == (503, "loading")
            assert response.headers["retry-after"]


def test_many_at_once_are_all_right(site: Site, lm: LanguageModel) -> None:
    options: dict[str, Any] = {"max_denoising_steps": 2}
    wanted = [lm.generate(PUZZLE, seed=seed, **options).text for seed in range(4)]
    with ThreadPoolExecutor(64) as clients:
        got = list(clients.map(lambda n: site.ask(seed=n % 4, **options), range(64)))
    assert [response.status_code for response in got] == [200] * 64
    texts = [response.json()["choices"][0]["message"]["content"] for response in got]
    assert texts == wanted * 16


def test_a_full_queue_takes_all_of_a_request_or_nothing(lm: LanguageModel) -> None:
    with serving(lm, Limits(rows=1, waiting=3)) as site, ThreadPoolExecutor(1) as clients:
        scheduler, go_on = site.service.engine.scheduler, threading.Event()
        held = site.service.engine.run(go_on.wait)
        first = clients.submit(site.ask, n=2, max_denoising_steps=1)
        assert until(lambda: len(scheduler.waiting) == 2)
        full = site.ask(n=2)
        assert (full.status_code, full.json()["error"]["code"]) == (429, "queue_full")
        assert full.headers["retry-after"] == "1"
        assert len(scheduler.waiting) == 2
        assert site.ask(n=4).status_code == 400, "which would never fit"
        go_on.set()
        assert held.result(10)
        assert len(first.result(60).json()["choices"]) == 2


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_row(site: Site, stream: bool) -> None:
    scheduler = site.service.engine.scheduler
    body = {"messages": [{"role": "user", "content": PUZZLE}], "max_tokens": 800, "stream": stream, **SLOW}
    if stream:
        with httpx.stream("POST", f"{site.url}/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            assert until(lambda: len(scheduler.running) == 1)
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{site.url}/v1/chat/completions", json=body, timeout=0.3)
    assert until(lambda: scheduler.idle, 2), "it would have gone on for many seconds"
    assert until(lambda: not site.service.in_work.count)


def test_the_time_limit_ends_a_request(lm: LanguageModel) -> None:
    with serving(lm, time_limit=0.3) as site:
        response = site.ask(max_tokens=800, **SLOW)
        assert (response.status_code, response.json()["error"]["type"]) == (504, "timeout_error")
        with httpx.stream(
            "POST", f"{site.url}/v1/completions", json={"prompt": "1", "stream": True, "max_tokens": 800, **SLOW}
        ) as late:
            lines = [line for line in late.iter_lines() if line]
        assert "timeout_error" in lines[-1]
        assert until(lambda: site.service.engine.scheduler.idle)


def test_metrics_add_up(lm: LanguageModel) -> None:
    with serving(lm) as site:
        usages = [site.ask(seed=n, n=1 + n, max_denoising_steps=2).json()["usage"] for n in range(2)]
        site.ask(n=0)
        text = httpx.get(f"{site.url}/metrics").text

    def value(series: str) -> float:
        (found,) = re.findall(rf"^dgemma_{re.escape(series)} (\S+)$", text, re.M)
        return float(found)

    assert value('tokens_total{kind="prompt"}') == sum(u["prompt_tokens"] for u in usages)
    assert value('tokens_total{kind="generated"}') == sum(u["completion_tokens"] for u in usages)
    cached = sum(u["prompt_tokens_details"]["cached_tokens"] for u in usages)
    assert value('tokens_total{kind="cached"}') == cached == 90
    assert value("denoising_steps_total") == sum(u["diffusion"]["denoising_steps"] for u in usages)
    assert value('requests_total{endpoint="/v1/chat/completions",status="200"}') == 2
    assert value('requests_total{endpoint="/v1/chat/completions",status="400"}') == 1
    assert value("time_to_first_block_seconds_count") == 2
    assert value('request_duration_seconds_count{endpoint="/v1/chat/completions"}') == 3
    assert value("prefix_cache_bytes") > 0
    assert value("requests_running") == value("requests_waiting") == 0
