"""`dgemma batch`: a file of requests through the server's app, killed and continued."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dgemma.language_model import LanguageModel
from tests.serve.conftest import PUZZLE, serving


def request(custom_id: str, url: str = "/v1/chat/completions", **body: object) -> dict:
    if url == "/v1/chat/completions":
        body.setdefault("messages", [{"role": "user", "content": PUZZLE}])
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": "default", **body}}


def write(path: Path, *lines: dict | str) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def command(requests: Path, out: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "dgemma", "batch", str(requests), str(out), "sudoku", "--device", "cpu", *flags]


def batch(requests: Path, out: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(requests, out, *flags), capture_output=True, text=True, timeout=120, check=False)


def read(out: Path) -> list[dict]:
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_every_line_has_the_result_that_the_server_would_give(tmp_path: Path, lm: LanguageModel) -> None:
    score = {"prompt": PUZZLE, "template": "{{1}}", "choices": {"1": ["1", "2"]}}
    asked = [
        request("chat", seed=5),
        request("text", "/v1/completions", prompt=PUZZLE, max_tokens=30, seed=6),
        request("missing", model="another"),
        request("unfit", temperature="hot"),
        request("score", "/v1/score", **score),
    ]
    bad = ["nonsense", json.dumps({"custom_id": 7}), request("x", "/v1/embeddings"), request("s", stream=True)]
    requests = write(tmp_path / "in.jsonl", *asked, "", *bad)
    done = batch(requests, tmp_path / "out.jsonl")
    assert done.returncode == 1
    assert "9 results" in done.stderr
    found = {result["id"]: result for result in read(tmp_path / "out.jsonl")}
    assert sorted(found, key=lambda id: int(id.split("_")[-1])) == [
        f"batch_req_{n}" for n in (1, 2, 3, 4, 5, 7, 8, 9, 10)
    ]
    with serving(lm) as site:
        for number, line in enumerate(asked, 1):
            theirs = site.post(line["url"], **line["body"])
            mine = found[f"batch_req_{number}"]
            assert mine["custom_id"] == line["custom_id"]
            assert mine["error"] is None
            assert mine["response"]["status_code"] == theirs.status_code
            for part in ("choices", "error"):
                assert mine["response"]["body"].get(part) == theirs.json().get(part), line
    told = {n: found[f"batch_req_{n}"]["error"]["message"] for n in (7, 8, 9, 10)}
    assert told[7].startswith("line 7: not JSON")
    assert "custom_id" in told[8]
    assert "'/v1/embeddings' is not one of" in told[9]
    assert "no streams" in told[10]


def test_killed_and_continued_it_answers_each_line_once(tmp_path: Path) -> None:
    slow = {"stability_threshold": 47, "confidence_threshold": 0.0}
    requests = write(tmp_path / "in.jsonl", *(request(f"r{n}", seed=n, **slow) for n in range(12)))
    out = tmp_path / "out.jsonl"
    running = subprocess.Popen(command(requests, out, "--rows", "2"), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (out.exists() and out.read_bytes().count(b"\n") >= 3) and time.monotonic() < deadline:
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.wait()
    kept = [line for line in out.read_text().splitlines(keepends=True) if line.endswith("\n")]
    assert 3 <= len(kept) < 12
    with out.open("a") as file:  # as if it had been ended in the middle of a line
        file.write('{"id": "batch_req_12", "custom')
    done = batch(requests, out)
    assert done.returncode == 0, done.stderr
    assert out.read_text().startswith("".join(kept))
    found = read(out)
    assert sorted(result["custom_id"] for result in found) == sorted(f"r{n}" for n in range(12))
    assert len({result["id"] for result in found}) == 12
    before = out.read_bytes()
    assert batch(requests, out).returncode == 0
    assert out.read_bytes() == before


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    requests = write(tmp_path / "in.jsonl", request("one"))
    out = write(tmp_path / "out.jsonl", {"some": "thing"})
    done = batch(requests, out)
    assert done.returncode != 0
    assert "line 1, is no result of a batch" in done.stderr
    assert out.read_text() == '{"some": "thing"}\n'
    write(out, {"id": "batch_req_1", "custom_id": "other", "response": None, "error": None})
    done = batch(requests, out)
    assert done.returncode != 0
    assert "line 1 is 'one', but its result is of 'other'" in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="needs file locks")
def test_two_runs_do_not_share_a_file(tmp_path: Path) -> None:
    import fcntl

    requests, out = write(tmp_path / "in.jsonl", request("one")), tmp_path / "out.jsonl"
    with out.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = batch(requests, out)
    assert done.returncode != 0
    assert "another run is writing" in done.stderr
