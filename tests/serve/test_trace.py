"""`dgemma serve --trace`: what clients asked and were answered, as a trace that can be shown again."""

import io
import logging
from dataclasses import asdict
from pathlib import Path

import httpx
import pytest

from dgemma.decoding.events import Block, Finished, Step
from dgemma.decoding.trace import read
from dgemma.engine.scheduler import Limits
from dgemma.language_model import LanguageModel
from dgemma.serve.recorder import Recorder
from dgemma.serve.service import Service
from dgemma.terminal.replay import recording
from tests.serve.conftest import PUZZLE, SLOW, serving
from tests.serve.test_http import until


def test_every_request_is_recorded_with_its_settings(lm: LanguageModel, tmp_path: Path) -> None:
    path = tmp_path / "server.trace"
    with serving(lm, trace=path) as site:
        answer = site.ask(seed=3, n=2, max_denoising_steps=5).json()
        left_to_right = site.ask(autoregressive=True, temperature=0.5, max_tokens=4, seed=9).json()
        refused = site.ask(seed=3, foo=1)
        body = {"messages": [{"role": "user", "content": PUZZLE}], "max_tokens": 800, "stream": True, "draft": True}
        with httpx.stream("POST", f"{site.url}/v1/chat/completions", json=body | SLOW) as response:
            for line in response.iter_lines():
                if '"step"' in line:
                    break
        assert until(lambda: site.service.engine.scheduler.idle)
    assert refused.status_code == 400
    trace = read(path)
    assert trace.problem is None
    assert trace.header.options == asdict(lm.defaults) | {"eos_token_id": list(lm.defaults.eos_token_id)}
    assert set(trace.requests) == {0, 1, 2, -1}
    assert trace.ended == {2: ""}, "whose client left"

    for row in (0, 1):
        header, shown = trace.header_of(row), recording(trace, row)
        assert (header.seed, header.options["max_denoising_steps"]) == (3 + row, 5)
        assert header.prompt_tokens == lm.tokens(PUZZLE)
        *_, last = shown.events
        assert isinstance(last, Finished)
        assert lm.result(last).text == answer["choices"][row]["message"]["content"]
        steps = [event for event in lm.stream(PUZZLE, seed=3 + row, max_denoising_steps=5) if isinstance(event, Step)]
        assert [step.best.tolist() for step, _ in shown.steps] == [step.best.tolist() for step in steps]

    header, shown = trace.header_of(-1), recording(trace, -1)
    assert (header.options["autoregressive"], header.options["temperature"], header.seed) == (True, 0.5, 9)
    tokens = [token for event in shown.events if isinstance(event, Block) for token in event.tokens]
    assert lm.tokenizer.decode(tokens) == left_to_right["choices"][0]["message"]["content"]


def test_a_full_disk_ends_the_trace_and_no_request(lm: LanguageModel, caplog: pytest.LogCaptureFixture) -> None:
    class Full(io.BytesIO):
        def write(self, data: object) -> int:
            if self.tell() > 3000:
                raise OSError("no space left on device")
            return super().write(data)  # type: ignore[arg-type]

    file = Full()
    with serving(lm) as site:
        site.service.recorder = Recorder(file, "sudoku", lm)
        assert [site.ask(seed=1).status_code for _ in range(2)] == [200, 200]
    assert len(file.getvalue()) > 3000
    told = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert [record.getMessage() for record in told] == ["the trace ends here: no space left on device"]


def test_a_file_that_cannot_be_opened_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent/x\.trace"):
        Service("x", Limits(), 60, tmp_path / "absent" / "x.trace")
