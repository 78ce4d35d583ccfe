"""A scripted server that keeps the contract of `dgemma serve`, and chromium to look at its page."""

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from time import sleep
from typing import Any

import pytest

import dgemma

PAGE = Path(dgemma.__file__).parent / "serve" / "page"
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
FLAGS += ["--disable-sync", "--no-first-run", "--disable-quic"]
ANSWER = "A block of noise settles all at once: the sure tokens first, then those which lean on them."
DEFAULTS = {
    "max_new_tokens": 256,
    "max_denoising_steps": 48,
    "t_min": 0.4,
    "t_max": 0.8,
    "stability_threshold": 1,
    "confidence_threshold": 0.005,
    "greedy": False,
    "eos_token_id": [1],
    "pad_token_id": 0,
    "entropy_bound": 0.1,
}
CANVAS, STEPS = 12, 5
SETTINGS, UNPACED = "dgemma.settings", '{"pace": 0}'


@dataclass
class Script:
    """What the server does next. mode: ok, drop, gone, loading, thoughts, or a status of HTTP as a number."""

    mode: str | int = "ok"
    delay: float = 0.0  # seconds a step takes
    gate: threading.Semaphore | None = None  # what a step needs to let the next one begin
    key: str = ""
    thinking: bool = True
    conversation: bool = True
    canvas: int = CANVAS
    bodies: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""

    @property
    def body(self) -> dict[str, Any]:
        """The newest request that is no rival of another."""
        return [body for body in self.bodies if not body.get("autoregressive")][-1]


def tokens_of(text: str) -> list[str]:
    """Words with the space before them."""
    return [word if i == 0 else f" {word}" for i, word in enumerate(text.split(" "))]


def steps_of(block: int, kept: list[str], canvas: int) -> Iterator[dict[str, Any]]:
    """Position i settles at step 1 + i % STEPS; before that it is noise of high entropy."""
    best = [*kept, "<turn|>", *["<pad>"] * canvas][:canvas]
    for step in range(1, STEPS + 1):
        settled = [step > i % STEPS for i in range(canvas)]
        entropy = [0.001 if s else round(4 - 0.6 * step - 0.01 * (i % 9), 3) for i, s in enumerate(settled)]
        yield {
            "event": "step",
            "block": block,
            "step": step,
            "temperature": 0.8 - 0.08 * step,
            "mean_entropy": sum(entropy) / canvas,
            "still": step == STEPS,
            "tokens": [best[i] if s else f" ?{step}" for i, s in enumerate(settled)],
            "canvas": [best[i] if s else f" #{step}" for i, s in enumerate(settled)],
            "entropy": entropy,
            "accepted": [int(s) for s in settled],
        }


class Handler(BaseHTTPRequestHandler):
    script: Script

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if self._gone():
            return
        if path == "/health":
            loading = self.script.mode == "loading"
            self._json(503 if loading else 200, {"status": "loading" if loading else "ok"})
        elif path == "/v1/models":
            can = {"thinking": self.script.thinking, "tools": True, "conversation": self.script.conversation}
            extra = {"canvas_length": self.script.canvas, "max_position_embeddings": 4096, "defaults": DEFAULTS}
            entry = {"id": "scripted", "dgemma": {**extra, **can}}
            if self._allowed():
                self._json(200, {"object": "list", "data": [entry]})
        else:
            file = PAGE / ("index.html" if path == "/" else path.removeprefix("/page/"))
            found = file.is_file()
            self._send(200 if found else 404, TYPES.get(file.suffix, "text/plain"), file.read_bytes() if found else b"")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.script.bodies.append(body)
        if self._gone() or not self._allowed():
            return
        if isinstance(self.script.mode, int):
            headers = {"Retry-After": "7"} if self.script.mode == 429 else {}
            return self._json(self.script.mode, {"error": {"message": f"scripted {self.script.mode}"}}, headers)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        with suppress(OSError):  # the client has stopped
            self._autoregressive() if body.get("autoregressive") else self._answer(body)

    def _answer(self, body: dict[str, Any]) -> None:
        ask, mode = body["messages"][-1]["content"], self.script.mode
        text = ask.removeprefix("echo ") if ask.startswith("echo ") else ANSWER
        words = tokens_of(text)
        if "pins" in body:  # token i + 100 is word i; what is not pinned is new
            pins = {int(place): token for place, token in body["pins"].items()}
            words = [words[pins[i] - 100] if i in pins else f" new{i}" for i in range(len(pins) + body["max_tokens"])]
        text = whole = "".join(words)
        if mode == "thoughts":
            self._delta(reasoning_content="First, think.")
            whole = f"<|channel>thought\nFirst, think.\n<channel|>{text}<|tool_call>call:add{{a:1}}<tool_call|>"
        self._event({"event": "prefilled", "prompt_tokens": 9, "cached_tokens": 0, "seconds": 0.01})
        size = self.script.canvas
        blocks = [words[i : i + size] for i in range(0, len(words), size)]
        for b, kept in enumerate(blocks):
            for step in steps_of(b, kept, size):
                self._event(step)
                sleep(self.script.delay)
                if self.script.gate:
                    self.script.gate.acquire(timeout=10)
            part = "".join(kept)
            last = b == len(blocks) - 1
            ids = list(range(100 + b * size, 100 + b * size + len(kept)))
            told = {"block": b, "tokens": len(kept), "steps": STEPS, "text": part, "ids": ids, "texts": kept}
            self._event({"event": "block", **told})
            held = 3 if last else 0  # characters that could begin a stop string: after the final text
            self._delta(content=part[: len(part) - held])
            if mode == "drop":
                return
        if mode == "thoughts":
            call = {"index": 0, "id": "call_1", "function": {"name": "add", "arguments": '{"a": 1}'}}
            self._delta(tool_calls=[call])
        steps = STEPS * len(blocks)
        diffusion = {"denoising_steps": steps, "tokens_per_forward": len(words) / steps, "converged": True}
        diffusion |= {"denoise_seconds": 0.5, "prefill_seconds": 0.0, "commit_seconds": 0.0, "seed": body["seed"]}
        usage = {"prompt_tokens": 9, "completion_tokens": len(words), "diffusion": diffusion}
        self._event({"event": "finished", "text": whole, "reason": "stop", "usage": usage})
        self._delta(content=text[-3:])
        self._chunk({"choices": [], "usage": usage})
        self._write("data: [DONE]\r\n\r\n")

    def _autoregressive(self) -> None:
        for token in tokens_of(ANSWER):
            self._delta(content=token)
            sleep(self.script.delay / 2)
        self._chunk({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": len(tokens_of(ANSWER))}})
        self._write("data: [DONE]\n\n")

    def _delta(self, **delta: Any) -> None:
        self._chunk({"choices": [{"index": 0, "delta": delta}]})

    def _event(self, event: dict[str, Any]) -> None:
        self._chunk({"choices": [], "dgemma": event})

    def _chunk(self, chunk: dict[str, Any]) -> None:
        self._write(f": keep-alive\n\ndata: {json.dumps(chunk)}\n\n")

    def _write(self, text: str) -> None:
        self.wfile.write(text.encode())
        self.wfile.flush()

    def _gone(self) -> bool:
        if self.script.mode == "gone":
            self.close_connection = True
        return self.script.mode == "gone"

    def _allowed(self) -> bool:
        allowed = not self.script.key or self.headers["Authorization"] == f"Bearer {self.script.key}"
        if not allowed:
            self._json(401, {"error": {"message": "wrong key"}})
        return allowed

    def _json(self, status: int, body: object, headers: dict[str, str] | None = None) -> None:
        self._send(status, "application/json", json.dumps(body).encode(), headers)

    def _send(self, status: int, kind: str, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def script() -> Iterator[Script]:
    """A server of its own for each test, on a free port."""
    script = Script()
    handler = type("Scripted", (Handler,), {"script": script})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    script.url = f"http://127.0.0.1:{server.server_port}/"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield script
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright for Python is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, script: Script) -> Iterator[Any]:
    """The page, opened. What its console called an error lies in `page.errors`."""
    context = browser.new_context(viewport={"width": 900, "height": 700})
    context.add_init_script(
        f"sessionStorage.getItem('{SETTINGS}') ?? sessionStorage.setItem('{SETTINGS}', '{UNPACED}')"
    )
    page = context.new_page()
    page.set_default_timeout(4000)
    page.errors = []
    page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.goto(script.url)
    yield page
    context.close()
