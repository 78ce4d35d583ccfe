"""`dgemma serve` as a process: it says when it is ready, drains at a signal and stops at the second."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from tests.serve.conftest import PUZZLE, SLOW

LONG: dict[str, Any] = {"messages": [{"role": "user", "content": PUZZLE}], "stream": True, "draft": True, **SLOW}


@contextmanager
def process(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "dgemma", "serve", "--port", "0", "--device", "cpu", *arguments]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes) as running:
        try:
            assert running.stdout
            yield running, running.stdout.readline().split()[-1]
        finally:
            running.kill()


def test_a_signal_drains_and_a_second_one_stops() -> None:
    with process("--quiet", "--name", "solver") as (server, url):
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "solver"
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=LONG, timeout=30) as response:
            lines = response.iter_lines()
            next(lines)
            server.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            health = httpx.get(f"{url}/health")
            assert (health.status_code, health.json()) == (503, {"status": "closing"})
            refused = httpx.post(f"{url}/v1/completions", json={"prompt": "1"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "closing")
            *_, last, done = [line for line in lines if line]
        assert done == "data: [DONE]"
        assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"]
        assert server.wait(10) == 0
        assert server.stderr
        assert server.stderr.read() == ""

    with process() as (server, url):
        long = {**LONG, "max_tokens": 800}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=long, timeout=30) as response:
            lines = response.iter_lines()
            next(lines)
            server.send_signal(signal.SIGINT)
            time.sleep(0.3)
            server.send_signal(signal.SIGINT)
            assert server.wait(8) == 0


def test_the_extra_is_asked_for_and_the_command_line_stays_light() -> None:
    code = (
        "import sys; sys.modules['fastapi'] = None; import dgemma.cli\n"
        "assert not {'torch', 'uvicorn', 'pydantic'} & set(sys.modules)\n"
        "sys.argv = ['dgemma', 'serve']; dgemma.cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "pip install 'dgemma[serve]'" in done.stderr
    assert done.stderr.count("\n") == 1
