"""Servers on free ports, in threads of the test process."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

import dgemma
from dgemma.decoding.events import Block, Finished, Prefilled
from dgemma.engine.scheduler import Limits
from dgemma.language_model import LanguageModel
from dgemma.serve.app import make_app
from dgemma.serve.server import Server, bind, url
from dgemma.serve.service import Service
from dgemma.train.options import Recipe, TrainOptions
from dgemma.train.run import run

PUZZLE = ".16....9. 45...72.. ..8..6731 .69.34..5 .4579.... ...5.24.9 ..1.4...7 ...1893.. .8.67...."
SLOW = {"stability_threshold": 47, "confidence_threshold": 0.0}
"""Options by which a canvas takes all of its steps."""


@dataclass(frozen=True)
class Site:
    """A running server; `service` is its inside."""

    url: str
    service: Service

    @property
    def client(self) -> Any:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def post(self, path: str = "/v1/chat/completions", **body: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60)

    def ask(self, **body: Any) -> httpx.Response:
        return self.post(messages=[{"role": "user", "content": PUZZLE}], **body)


Start = Callable[..., Any]


@contextmanager
def serving(
    lm: LanguageModel | None,
    limits: Limits | None = None,
    time_limit: float = 60,
    trace: Path | None = None,
    media_hosts: Sequence[str] = (),
    **app: Any,
) -> Iterator[Site]:
    """Serves a model, or, for None, a load that does not end."""
    service = Service(lm.name if lm else "absent", limits or Limits(), time_limit, trace, media_hosts)
    if lm:
        service.open(lm)
    with bind("127.0.0.1", 0) as listening:
        server = Server(make_app(service, **app), service)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield Site(url(listening), service)
        finally:
            server.should_exit = True
            service.close()
            thread.join(20)


@pytest.fixture(scope="session")
def lm() -> LanguageModel:
    return dgemma.load("sudoku", "cpu")


@pytest.fixture(scope="session")
def site(lm: LanguageModel) -> Iterator[Site]:
    with serving(lm) as site:
        yield site


@pytest.fixture(scope="session")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A model of random weights that has the whole chat format: thoughts and tools."""
    small = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "canvas_length": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_global_key_value_heads": 2}
    sizes = {**small, **heads, "head_dim": 16, "global_head_dim": 16}
    recipe = Recipe("tiny", {"prose:facts": 1.0}, scratch=True, config=sizes, options=TrainOptions(steps=1, batch=2))
    directory: Path = run(recipe, tmp_path_factory.mktemp("talker"), "cpu")
    with serving(dgemma.load(directory, "cpu")) as site:
        yield site


@pytest.fixture
def say(talker: Site, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Lets the model commit given texts, a block each, whatever is asked; returns the list of what is cancelled."""

    def say(*texts: str, reason: str = "stop") -> list[Any]:
        encode = talker.service.lm.tokenizer.encode
        cancelled: list[Any] = []

        def submit_all(requests: Any, salt: str = "") -> list[str]:
            for request, take, ended in requests:
                take(Prefilled(0, len(request.prompt), 0, 0.5))
                for number, text in enumerate(texts):
                    request.tokens += encode(text)
                    take(Block(0, number, encode(text), 3, True, 0.25))
                take(Finished(0, request.tokens, reason, [3] * len(texts), [True] * len(texts), 1, 0.0, 0.0, 0.0))
                ended(None)
            return ["job"] * len(requests)

        monkeypatch.setattr(talker.service.engine, "submit_all", submit_all)
        monkeypatch.setattr(talker.service.engine, "cancel", cancelled.append)
        return cancelled

    return say
