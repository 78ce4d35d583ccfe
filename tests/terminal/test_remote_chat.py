"""`dgemma chat --url` against a real server, and against servers that are strange or gone."""

import json
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

import dgemma
from dgemma.decoding.events import Finished, Prefilled, Step
from dgemma.flags import UsageError
from dgemma.language_model import LanguageModel
from dgemma.terminal.remote import RemoteChat, RemoteModel, Server, fields_of, sse
from dgemma.text.output import parse
from tests.serve.conftest import Site, serving
from tests.serve.test_http import until

from .conftest import Process
from .test_cli import dgemma_run


@pytest.fixture(scope="module")
def lm(small_model: Path) -> LanguageModel:
    return dgemma.load(small_model, "cpu")


@pytest.fixture(scope="module")
def site(lm: LanguageModel) -> Iterator[Site]:
    with serving(lm, quiet=True) as site:
        yield site


def chat(site: Site, drafts: bool = False, **options: Any) -> RemoteChat:
    model = RemoteModel.find(Server.at(site.url), None)
    return RemoteChat(model, fields_of({"seed": 0, "max_new_tokens": 16, **options}), drafts)


def test_answers_of_a_script_are_those_of_the_model_itself(site: Site, lm: LanguageModel) -> None:
    lines = "one\ntwo\n/reset\nthree\n/help\n"
    done = dgemma_run("chat", "--url", site.url, "-n", "16", "--steps", "1", "--system", "be brief", stdin=lines)
    here = lm.chat(max_new_tokens=16, max_denoising_steps=1)
    here.messages = [{"role": "system", "content": "be brief"}]
    expected = []
    for text in ("one", "two", "three"):
        if text == "three":
            here.reset()
        *_, last = here.send(text)
        assert isinstance(last, Finished)
        expected.append(here.lm.result(last).text + "\n")
    assert (done.returncode, done.stdout) == (0, "".join(expected))
    assert "/reset" in done.stderr


def test_drafts_are_the_models_own_steps(site: Site, lm: LanguageModel) -> None:
    there = chat(site, drafts=True, max_denoising_steps=3)
    events = list(there.send("one"))
    own = list(lm.stream("one", max_new_tokens=16, max_denoising_steps=3))
    (first, *_), steps = events, [event for event in events if isinstance(event, Step)]
    assert isinstance(first, Prefilled)
    assert isinstance(own[0], Prefilled)
    assert first.tokens + first.cached == own[0].tokens
    wanted = [event for event in own if isinstance(event, Step)]
    assert 1 <= len(steps) <= len(wanted), "a slow reader misses steps"
    for step in steps:
        (right,) = (event for event in wanted if event.step == step.step)
        assert there.words.decode(step.best.tolist()) == lm.tokenizer.decode(right.best.tolist())
        assert step.accepted.tolist() == right.accepted.tolist()
        assert step.mean_entropy == right.mean_entropy
    assert there.summary("length")[:2] == ["16 tokens", f"{there.usage['diffusion']['denoising_steps']} steps"]


def test_a_turn_counts_once_it_is_complete(site: Site) -> None:
    there = chat(site)
    for _ in there.send("one"):
        break
    assert there.messages == []
    list(there.send("two"))
    assert [m["role"] for m in there.messages] == ["user", "assistant"]
    kept = list(there.messages)
    there.options["t_min"] = -1
    with pytest.raises(OSError, match=r"^http://127.0.0.1:\d+/v1: t_min: .*greater than or equal to 0$"):
        list(there.send("three"))
    assert there.messages == kept


def test_at_a_terminal(site: Site) -> None:
    process = Process(["chat", "--url", site.url, "--visual", "-n", "15000"])
    at = process.wait_for("> ")
    process.send("hello\r")
    at = process.wait_for("step", after=at)
    process.send("\x03")  # stops the answer, here and there, not the program
    at = process.wait_for("> ", after=process.wait_for("stopped", after=at))
    process.send("/think\r")
    at = process.wait_for("> ", after=process.wait_for("thinking is on", after=at))
    process.send("\x04")
    assert process.finish() == 0
    assert b"Traceback" not in process.raw
    assert until(lambda: site.service.engine.scheduler.idle)


def test_a_server_that_goes_leaves_the_conversation(lm: LanguageModel) -> None:
    with serving(lm, quiet=True) as site:
        there = chat(site)
        list(there.send("one"))
        kept = list(there.messages)
    with pytest.raises(OSError, match=f"^{site.url}/v1: Connection refused$"):
        list(there.send("two"))
    assert there.messages == kept


def test_the_key_and_wrong_calls(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DGEMMA_API_KEY", raising=False)
    with serving(lm, key="secret", quiet=True) as site:
        with pytest.raises(OSError, match="a valid API key is expected"):
            RemoteModel.find(Server.at(site.url), None)
        assert RemoteModel.find(Server.at(f"{site.url}/v1/", "secret"), None).name == lm.name
        assert RemoteModel.find(Server.at(site.url, "secret"), "other").name == "other"
    for url in ("127.0.0.1:8000", "ftp://x", "http://", "http://x:99999", "http://u:p@x", "http://x?y"):
        with pytest.raises(UsageError, match="--url takes an address"):
            Server.at(url)
    for key in ("", "a b", "a\nb", "ä"):
        with pytest.raises(UsageError, match="the API key must be") as error:
            Server.at("http://x", key)
        assert key not in str(error.value) or not key


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--url", "http://127.0.0.1:1", "--device", "cpu"], "--device has no effect with --url"),
        (["--url", "http://127.0.0.1:1", "--dtype", "float32"], "--dtype has no effect with --url"),
        (["--api-key", "k"], "--api-key has no effect without --url"),
    ],
)
def test_flags_without_effect_are_refused(flags: list[str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from dgemma.cli import app

    done = CliRunner().invoke(app, ["chat", *flags])
    assert isinstance(done.exception, UsageError)
    assert str(done.exception) == words


@contextmanager
def foreign(answer: Callable[[str, Any], bytes], kind: str = "text/event-stream") -> Iterator[tuple[str, list[Any]]]:
    """A server that is none of ours; `answer` makes a response's body of path and request."""
    asked: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(None)

        def do_POST(self) -> None:
            self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def reply(self, body: Any) -> None:
            asked.append(body)
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(answer(self.path, body))

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


MODELS = b'{"data": [{"id": "first"}, {"id": "second"}]}'


def chunks(*deltas: dict[str, Any], end: str = "data: [DONE]\n\n") -> bytes:
    told = [{"choices": [{"delta": delta, "finish_reason": None}]} for delta in deltas]
    told.append({"choices": [{"delta": {}, "finish_reason": "stop"}]})
    return "".join(f": still here\n\ndata: {json.dumps(chunk)}\r\n\r\n" for chunk in told).encode() + end.encode()


def test_another_server_is_spoken_to_as_openai_would() -> None:
    said = chunks({"reasoning_content": "Hm"}, {"reasoning_content": "."}, {"content": "Bon"}, {"content": "jour"})
    with foreign(lambda path, body: said if body else MODELS) as (url, asked):
        there = RemoteChat(RemoteModel.find(Server.at(url), None), {}, drafts=False)
        *events, last = there.send("Hello", think=True)
    wanted = {"model": "first", "messages": [{"role": "user", "content": "Hello"}], "stream": True}
    thinking = {"stream_options": {"include_usage": True}, "chat_template_kwargs": {"enable_thinking": True}}
    assert asked == [None, wanted | thinking]
    assert isinstance(last, Finished)
    assert there.messages[-1] == {"role": "assistant", "content": "Bonjour"}
    shown = parse("".join(there.words.decode(event.tokens) for event in events))  # type: ignore[union-attr]
    assert (shown.reasoning, shown.content) == ("Hm.", "Bonjour")
    assert there.summary("stop") == []


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"", "the answer ended before its end"),
        (chunks({"content": "half"})[:70], "the answer ended before its end"),
        (b'data: {"error": {"message": "out of\\n memory \\u001b"}}\n\n', "out of memory ␛"),
        (b"data: [1]\n\n", "the answer is not of OpenAI's interface"),
        (b'data: {"choices": [3]}\n\n', "the answer is not of OpenAI's interface"),
    ],
)
def test_a_broken_answer_is_one_line(answer: bytes, words: str) -> None:
    with foreign(lambda path, body: answer if body else MODELS) as (url, _):
        there = RemoteChat(RemoteModel.find(Server.at(url), None), {}, drafts=False)
        with pytest.raises(OSError, match=f"^{url}/v1: {words}$"):
            list(there.send("Hello"))
        assert there.messages == []
    with (
        foreign(lambda path, body: b'{"data": []}') as (url, _),
        pytest.raises(OSError, match="no model is listed"),
    ):
        RemoteModel.find(Server.at(url), None)


def test_events_end_at_blank_lines() -> None:
    lines = [
        b": hi\n",
        b"\n",
        b"event: x\n",
        b"data: a\n",
        b"data:b\n",
        b"\n",
        b"\r\n",
        b"data:  c\r\n",
        b"\n",
        b"data: d",
    ]
    assert list(sse(lines)) == ["a\nb", " c"]


def test_a_server_that_is_not_there_is_one_line_of_a_script() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        done: subprocess.CompletedProcess[str] = dgemma_run("chat", "--url", url, stdin="one\n")
    assert done.returncode == 1
    assert done.stderr == f"dgemma: {url}/v1: Connection refused\n"
