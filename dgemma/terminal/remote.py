"""`dgemma chat --url`: the conversation of a terminal with the model of a server that has OpenAI's interface."""

import json
import os
import ssl
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from time import monotonic
from typing import Any
from urllib.parse import urlsplit

import torch

from dgemma.decoding.events import Block, Event, Finished, Prefilled, Step
from dgemma.flags import UsageError
from dgemma.terminal.attach import Content, Part, sendable
from dgemma.terminal.chat import Conversation
from dgemma.terminal.layout import clean
from dgemma.terminal.replay import Spellings
from dgemma.terminal.screen import Screen, note
from dgemma.terminal.view import View
from dgemma.text.output import THOUGHT, THOUGHT_END

CONNECT, SILENCE = 10.0, 600.0
"""Seconds until a server counts as absent, and until one that says nothing counts as gone."""
UNFIT = "the answer is not of OpenAI's interface"


@dataclass(frozen=True)
class Server:
    """Where to ask. base: scheme, host and path, such as "http://127.0.0.1:8000/v1". Its errors are OSErrors."""

    base: str
    key: str | None = field(default=None, repr=False)

    @classmethod
    def at(cls, url: str, key: str | None = None) -> "Server":
        """A server by its address, whose path is /v1 if it has none; UsageError if it makes no sense."""
        try:
            parts = urlsplit(url)
            fit = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            fit = False
        if not fit or parts.query or parts.fragment or parts.username is not None:
            raise UsageError(f"--url takes an address such as http://127.0.0.1:8000, not {url!r}")
        if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
            raise UsageError("the API key must be printable ASCII without blanks")
        return cls(f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/') or '/v1'}", key)

    def get(self, path: str) -> Any:
        with self._asked("GET", path) as response:
            return _json(response.read())

    def post(self, path: str, body: dict[str, Any]) -> Any:
        with self._asked("POST", path, body) as response:
            return _json(response.read())

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The chunks of an answer as they come; a caller who stops iterating hangs up."""
        with self._asked("POST", path, {**body, "stream": True}) as response:
            for data in sse(response):
                if data == "[DONE]":
                    return
                chunk = _json(data)
                if "error" in chunk:
                    raise OSError(_told(chunk, "the server reports an error"))
                yield chunk

    @contextmanager
    def _asked(self, method: str, path: str, body: Any = None) -> Iterator[HTTPResponse]:
        """A response of status 2xx; whatever goes wrong while it is read is an OSError that names the server."""
        parts = urlsplit(self.base)
        assert parts.hostname
        connection: HTTPConnection
        if parts.scheme == "https":
            context = ssl.create_default_context()
            connection = HTTPSConnection(parts.hostname, parts.port, timeout=CONNECT, context=context)
        else:
            connection = HTTPConnection(parts.hostname, parts.port, timeout=CONNECT)
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        try:
            connection.connect()
            connection.sock.settimeout(SILENCE)
            connection.request(method, parts.path + path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            if response.status >= 300:
                raise OSError(_told(_parsed(response.read()), f"it answers {response.status} {response.reason}"))
            yield response
        except (OSError, HTTPException) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise OSError(f"{self.base}: {reason}") from None
        finally:
            connection.close()


def sse(lines: Iterable[bytes]) -> Iterator[str]:
    """The data of each server-sent event; comments and other fields are passed over."""
    data: list[str] = []
    for line in lines:
        text = line.decode("utf-8", "replace").rstrip("\r\n")
        if text.startswith("data:"):
            data.append(text[5:].removeprefix(" "))
        elif not text and data:
            yield "\n".join(data)
            data = []


class Words(Spellings):
    """Token ids for the pieces of text that a server sends instead."""

    def __init__(self, ends: Iterable[str]):
        super().__init__({})
        self._ids: dict[str, int] = {}
        self.ends = self.special_ids = frozenset(map(self.id, ends))

    def id(self, text: str) -> int:
        number = self._ids.setdefault(text, len(self._ids))
        self.texts[number] = text
        return number


@dataclass(frozen=True)
class RemoteModel:
    """A model of a server. card: what /v1/models says of it; the servers of this project add a key "dgemma"."""

    server: Server
    name: str
    card: dict[str, Any]

    @classmethod
    def find(cls, server: Server, name: str | None) -> "RemoteModel":
        """The model of a name, or the first one."""
        try:
            cards = server.get("/models")["data"]
            chosen = next((card for card in cards if card["id"] == name), cards[0] if cards else {})
            return cls(server, name or chosen["id"], chosen.get("dgemma") or {})
        except (LookupError, TypeError, AttributeError):
            raise OSError(f"{server.base}/models: no model is listed: is this the right address?") from None

    def ends(self) -> list[str]:
        """How the tokens read that end a text."""
        root = Server(self.server.base.removesuffix("/v1"), self.server.key)
        return [root.post("/detokenize", {"tokens": [i]})["prompt"] for i in self.card["defaults"]["eos_token_id"]]


class RemoteChat:
    """Several turns with a model that is elsewhere; what `Chat` is for one that is here.

    options: fields of every request. drafts: ask for the denoising steps, which only servers of this project show.
    """

    def __init__(self, lm: RemoteModel, options: dict[str, Any], drafts: bool):
        self.lm, self.options, self.drafts = lm, options, drafts
        self.words = Words(lm.ends() if drafts else [])
        self.messages: list[dict[str, Any]] = []
        self.usage: dict[str, Any] = {}
        self.seconds = 0.0

    def reset(self) -> None:
        """Forgets all turns but a system message."""
        self.messages = [message for message in self.messages if message["role"] == "system"]

    def send(self, content: Content, think: bool = False) -> Iterator[Event]:
        """The answer as events; the turn counts once it is complete.

        Text comes as blocks of one made-up token each, with the marks of thoughts around what the server calls so.
        """
        if not self.lm.card.get("conversation", True):  # made for one question at a time
            self.reset()
        messages = [*self.messages, {"role": "user", "content": sendable(content)}]
        body = {"model": self.lm.name, "messages": messages, "stream_options": {"include_usage": True}, **self.options}
        if think:
            body["chat_template_kwargs"] = {"enable_thinking": True}
        if self.drafts:
            body["draft"] = True
        answer, reason, thinking, began = "", "", False, monotonic()
        self.usage = {}
        try:
            for chunk in self.lm.server.stream("/chat/completions", body):
                self.usage = chunk.get("usage") or self.usage
                if draft := chunk.get("dgemma"):
                    yield from self._draft(draft)
                for choice in chunk.get("choices", [])[:1]:
                    reason = choice.get("finish_reason") or reason
                    thought, said = (choice["delta"].get(name) or "" for name in ("reasoning_content", "content"))
                    if thought:
                        yield self._block(thought if thinking else f"{THOUGHT}thought\n{thought}")
                        thinking = True
                    if said:
                        yield self._block(THOUGHT_END + said if thinking else said)
                        answer, thinking = answer + said, False
        except (LookupError, TypeError, AttributeError):
            raise OSError(f"{self.lm.server.base}: {UNFIT}") from None
        if not reason:
            raise OSError(f"{self.lm.server.base}: the answer ended before its end")
        self.seconds = monotonic() - began
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        yield Finished(0, [], reason, [], [], 0, 0.0, 0.0, 0.0)

    def _block(self, text: str) -> Block:
        return Block(0, 0, [self.words.id(text)], 0, True, 0.0)

    def _draft(self, draft: dict[str, Any]) -> Iterator[Event]:
        match draft["event"]:
            case "prefilled":
                cached = draft["cached_tokens"]
                yield Prefilled(0, draft["prompt_tokens"] - cached, cached, draft["seconds"])
            case "step":
                best, canvas = (torch.tensor([self.words.id(t) for t in draft[k]]) for k in ("tokens", "canvas"))
                accepted, entropy = torch.tensor(draft["accepted"]).bool(), torch.tensor(draft["entropy"])
                place = (0, draft["block"], draft["step"], draft["temperature"])
                yield Step(*place, best, canvas, accepted, entropy, draft["mean_entropy"], draft["still"])
            case "block":  # its text comes as any text does; here it only counts
                blanks = [self.words.id("")] * draft["tokens"]
                yield Block(0, draft["block"], blanks, draft["steps"], draft["converged"], draft["seconds"])

    def summary(self, reason: str) -> list[str]:
        """What came of the last answer, as far as the server tells, in a few words each."""
        tokens, diffusion = self.usage.get("completion_tokens"), self.usage.get("diffusion")
        parts = [] if tokens is None else [f"{tokens} tokens", f"{tokens / max(1e-6, self.seconds):.0f} tok/s"]
        if diffusion:
            parts[1:1] = [f"{diffusion['denoising_steps']} steps"]
            parts += [] if diffusion["converged"] else ["not converged"]
        return parts + cut(reason)


def cut(reason: str) -> list[str]:
    return ["cut at the limit (--max-new-tokens)"] if reason == "length" else []


def converse(
    url: str,
    key: str | None,
    model: str | None,
    system: str | None,
    think: bool,
    visual: bool,
    options: dict[str, Any],
    shown: Sequence[Part] = (),
    media: dict[str, Any] | None = None,
) -> None:
    """Talks until the input ends. key: DGEMMA_API_KEY if None; options, media: as `LanguageModel.stream` takes them;
    shown: files that go along with the first message.
    """
    server = Server.at(url, key if key is not None else os.environ.get("DGEMMA_API_KEY") or None)
    lm = RemoteModel.find(server, model)
    if visual and not lm.card:
        raise UsageError("--visual has no effect: this server shows no denoising")
    if media and not lm.card:
        raise UsageError(f"--{next(iter(media)).replace('_', '-')} has no effect: this server does not take it")
    fields = fields_of(options) | ({"media": media} if media else {})
    chat = RemoteChat(lm, fields, drafts=visual and Screen(sys.stdout).live)

    def answer(said: Content, think: bool) -> None:
        view = View(Screen(sys.stdout), chat.words, chat.words.ends, visual)  # type: ignore[arg-type]
        reason = view.show(chat.send(said, think)).reason
        told = chat.summary(reason) if sys.stderr.isatty() else cut(reason)
        if told:
            note(" · ".join(told), faint=True)

    conversation = Conversation(chat, answer, think, shown)
    if system:
        conversation.set_system(system)
    conversation.run()


def fields_of(options: dict[str, Any]) -> dict[str, Any]:
    """Options by the names of a request's fields."""
    body = dict(options)
    if "max_new_tokens" in body:
        body["max_tokens"] = body.pop("max_new_tokens")
    if body.pop("greedy", False):
        body["temperature"] = 0
    return body


def _parsed(data: str | bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _json(data: str | bytes) -> dict[str, Any]:
    values = _parsed(data)
    if not isinstance(values, dict):
        raise OSError(UNFIT)
    return values


def _told(body: Any, otherwise: str) -> str:
    """The message of an error in OpenAI's shape, on one line and harmless for a terminal."""
    error = body.get("error") if isinstance(body, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return clean(" ".join(message.split())) if isinstance(message, str) and message else otherwise
