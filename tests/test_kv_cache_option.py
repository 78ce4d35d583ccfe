"""`--kv-cache`: from the command line to the pages."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from dgemma.cli import app
from dgemma.config import FULL, SLIDING
from dgemma.language_model import LanguageModel, load
from dgemma.serve.server import Server
from dgemma.serve.service import Service

PUZZLE = ".16....9. 45...72.. ..8..6731 .69.34..5 .4579.... ...5.24.9 ..1.4...7 ...1893.. .8.67...."


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, arguments)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize(
    "command",
    [
        ["run", "tiny", "-p", "1 + 1"],
        ["chat", "tiny"],
        ["infill", "tiny", "FILE", "--marker", "gap"],
        ["edit", "tiny", "FILE", "--noise", "0.5"],
        ["eval", "arithmetic", "tiny", "--count", "1"],
    ],
    ids=lambda command: command[0],
)
def test_commands_load_with_it(command: list[str], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Loaded(Exception):  # noqa: N818
        pass

    def loaded(*arguments: Any, **options: Any) -> LanguageModel:
        raise Loaded(load(*arguments, **options).model.page_format.codes)

    monkeypatch.setattr("dgemma.language_model.load", loaded)
    file = tmp_path / "file.txt"
    file.write_text("a gap here")
    result = invoke(*(str(file) if word == "FILE" else word for word in command), "--kv-cache", kind)
    assert isinstance(result.exception, Loaded), result.output
    assert result.exception.args == ({"int8": torch.int8, "fp8": torch.float8_e4m3fn}[kind],)


def test_a_server_keeps_its_pages_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[dict[str, torch.Tensor]] = []

    def run(server: Server, sockets: Any) -> None:
        service: Service = server.service
        end = time.monotonic() + 30
        while service.status == "loading" and not server.should_exit and time.monotonic() < end:
            time.sleep(0.01)
        service.engine.generate(service.lm.request(PUZZLE))
        kept.extend(page.tensors for page in service.engine.scheduler.prefixes._pages.values())

    monkeypatch.setattr(Server, "run", run)
    result = invoke("serve", "sudoku", "--port", "0", "--device", "cpu", "--kv-cache", "int8")
    assert result.exit_code == 0, result.output
    config = load("sudoku", "cpu").model.config
    assert kept
    for page in kept:
        for kind in {FULL, SLIDING} & set(config.layer_types):
            assert page[kind].dtype == torch.int8
            assert page[kind].shape[-1] == config.head_size(config.layer_types.index(kind)) + 2


def test_what_has_no_effect_is_refused() -> None:
    refused = invoke("chat", "--url", "http://127.0.0.1:1", "--kv-cache", "int8")
    assert "--kv-cache has no effect with --url" in str(refused.exception)
