"""The examples as a person runs them: processes that talk with a real `dgemma serve tiny`."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest

from tests.serve.test_command import process

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
CODE = "def area(width, height):\n    return \n\n\nprint(area(2, 3))  # größer\n"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "member": {"type": "boolean"},
    },
    "required": ["name", "age", "member"],
    "additionalProperties": False,
}
TEXTS = ["Anna, 31, lives in Oslo.", "Tom is 52 and lives in Lima.", "Nothing at all.", "Mia, 7, is a member.", "ß"]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with process("tiny") as (_, url):
        yield url


def example(name: str, *arguments: str | Path, said: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    return subprocess.run(
        command, input=said, capture_output=True, text=True, timeout=120, env=os.environ | {"LC_ALL": "C.UTF-8"}
    )


def test_infill_leaves_what_is_around_the_cursor_as_it_is(url, tmp_path):
    file = tmp_path / "area.py"
    file.write_text(CODE)
    shown = example("infill.py", file, "2:12", "--url", url, "--longest", "12")
    assert shown.returncode == 0, shown.stderr
    before, after = CODE[: CODE.index("return ") + 7], CODE[CODE.index("return ") + 7 :]
    assert shown.stdout.startswith(before)
    assert shown.stdout.endswith(after)
    assert len(shown.stdout) > len(CODE)
    assert file.read_text() == CODE
    assert example("infill.py", file, "2:12", "--url", url, "--longest", "12", "--write").stdout == ""
    assert file.read_text() == shown.stdout, "the same request gives the same answer"


@pytest.mark.parametrize(
    ("place", "options", "why"),
    [
        ("9:1", [], "infill: 9:1 is not in the text: it has 5 lines"),
        ("2:99", [], "infill: 2:99 is not in the text"),
        ("2:12", ["--longest", "0"], "infill: max_tokens"),
        ("2:12", ["--url", "http://127.0.0.1:9"], "infill: <urlopen error"),
    ],
)
def test_infill_tells_what_is_wrong(place, options, why, url, tmp_path):
    file = tmp_path / "area.py"
    file.write_text(CODE)
    found = example("infill.py", file, place, "--url", url, *options)
    assert found.returncode == 1
    assert found.stderr.startswith(why)
    assert file.read_text() == CODE


def test_the_agent_calls_a_tool_and_answers_with_what_it_said(url):
    found = example("agent.py", "What time is it in Oslo?", "--url", f"{url}/v1")
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert lines[1].startswith('calls get_time({"city":')
    assert lines[2].startswith("tool: {")
    assert lines[-1].startswith("assistant: ")


def test_the_agents_tools_tell_their_errors():
    sys.path.insert(0, str(EXAMPLES))
    try:
        import agent
    finally:
        sys.path.remove(str(EXAMPLES))
    assert json.loads(agent.called("get_time", '{"city": "Oslo"}')) == {"time": "09:30"}
    assert json.loads(agent.called("get_time", '{"city": "Rome"}')) == {"error": "KeyError: 'Rome'"}
    assert json.loads(agent.called("shout", "{}")) == {"error": "KeyError: 'shout'"}
    assert json.loads(agent.called("get_time", "{"))["error"].startswith("JSONDecodeError")
    parameters = agent.TOOLS[1]["function"]["parameters"]
    assert (list(parameters["properties"]), parameters["required"]) == (["city", "day"], ["city"])


def test_every_text_becomes_a_record_of_the_schema_in_order(url, tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(SCHEMA))
    found = example("extract.py", schema, "--url", f"{url}/v1", "--at-once", "4", said="\n".join(TEXTS) + "\n\n")
    assert found.returncode == 0, found.stderr
    records = [json.loads(line) for line in found.stdout.splitlines()]
    assert len(records) == len(TEXTS)
    for record in records:
        jsonschema.validate(record, SCHEMA)
    alone = example("extract.py", schema, "--url", f"{url}/v1", "--at-once", "1", said=TEXTS[1])
    assert json.loads(alone.stdout) == records[1]
