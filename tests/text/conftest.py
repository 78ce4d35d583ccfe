"""The released tokenizer and chat templates, and one tool."""

from pathlib import Path
from typing import Any

import pytest

from dgemma.text.chat import ChatTemplate
from dgemma.text.tokenizer import Tokenizer

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Its name"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}


@pytest.fixture(scope="session")
def released(shared: Path) -> Tokenizer:
    return Tokenizer.from_directory(shared)


@pytest.fixture(scope="session", params=["v1", "v2"])
def template(request: pytest.FixtureRequest, shared: Path) -> ChatTemplate:
    return ChatTemplate((shared / f"chat_template_{request.param}.jinja").read_text("utf-8"))


@pytest.fixture(scope="session")
def v1(shared: Path) -> ChatTemplate:
    return ChatTemplate((shared / "chat_template_v1.jinja").read_text("utf-8"))


@pytest.fixture(scope="session")
def v2(shared: Path) -> ChatTemplate:
    return ChatTemplate((shared / "chat_template_v2.jinja").read_text("utf-8"))


@pytest.fixture(scope="session")
def weather() -> dict[str, Any]:
    return WEATHER
