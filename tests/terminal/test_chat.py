"""Conversations: the commands in this process, the keys in a terminal of a process of its own."""

import io
import sys
from pathlib import Path

import pytest

import dgemma
from dgemma.decoding.events import Finished, Prefilled
from dgemma.language_model import Chat
from dgemma.terminal.chat import Conversation

from .conftest import Process
from .test_cli import dgemma_run


@pytest.fixture
def chat(small_model: Path) -> Chat:
    return dgemma.load(small_model).chat(max_new_tokens=16, max_denoising_steps=2)


class Talk:
    """Runs a conversation over given lines; keeps what was asked and how much of it was in the cache."""

    def __init__(self, chat: Chat):
        self.chat = chat
        self.asked: list[tuple[str, bool]] = []
        self.cached: list[int] = []

    def answer(self, text: str, think: bool) -> None:
        self.asked.append((text, think))
        for event in self.chat.send(text, think=think):
            if isinstance(event, Prefilled):
                self.cached.append(event.cached)

    def run(self, monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        Conversation(self.chat, self.answer).run()


def test_lines_are_questions_and_the_prefix_stays_in_the_cache(chat: Chat, monkeypatch: pytest.MonkeyPatch):
    talk = Talk(chat)
    talk.run(monkeypatch, "one", "", "two ", "three")
    assert talk.asked == [("one", False), ("two", False), ("three", False)]
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 3
    assert 0 < talk.cached[0] < talk.cached[1] < talk.cached[2]


def test_reset_forgets_the_turns(chat: Chat, monkeypatch: pytest.MonkeyPatch):
    talk = Talk(chat)
    talk.run(monkeypatch, "one", "/reset", "two")
    assert [m["content"] for m in chat.messages if m["role"] == "user"] == ["two"]
    assert talk.cached[0] == talk.cached[1]


def test_think_is_turned_on_and_off(chat: Chat, monkeypatch: pytest.MonkeyPatch):
    talk = Talk(chat)
    talk.run(monkeypatch, "/think", "one", "/think", "two")
    assert talk.asked == [("one", True), ("two", False)]


def test_a_system_message_is_set_and_removed(chat: Chat, monkeypatch: pytest.MonkeyPatch):
    talk = Talk(chat)
    talk.run(monkeypatch, "one", "/system be  brief", "/reset")
    assert chat.messages == [{"role": "system", "content": "be  brief"}]
    talk.run(monkeypatch, "/system")
    assert chat.messages == []


def test_what_only_begins_like_a_command_is_a_question(chat: Chat, monkeypatch: pytest.MonkeyPatch):
    talk = Talk(chat)
    talk.run(monkeypatch, "/etc/passwd", "/exit", "never")
    assert talk.asked == [("/etc/passwd", False)]


def test_an_unknown_command_ends_a_script(chat: Chat, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match=r"no command /rest; /help"):
        Talk(chat).run(monkeypatch, "/rest", "one")


def test_answers_of_a_script_go_to_standard_output(small_model: Path):
    done = dgemma_run("chat", small_model, "-n", "16", "--system", "be brief", stdin="one\ntwo\n/help\n")
    chat = dgemma.load(small_model).chat(max_new_tokens=16)
    chat.messages = [{"role": "system", "content": "be brief"}]
    expected = []
    for text in ("one", "two"):
        *_, last = chat.send(text)
        assert isinstance(last, Finished)
        expected.append(chat.lm.result(last).text + "\n")
    assert (done.returncode, done.stdout) == (0, "".join(expected))
    assert "/reset" in done.stderr


def test_at_a_terminal(small_model: Path):
    process = Process(["chat", str(small_model), "--visual", "-n", "15000"])
    at = process.wait_for("> ")
    process.send("hello\r")
    at = process.wait_for("step", after=at)
    process.send("\x03")  # stops the answer, not the program
    at = process.wait_for("stopped", after=at)
    at = process.wait_for("> ", after=at)
    process.send("half a li\x03")  # clears the line
    at = process.wait_for("> ", after=process.wait_for("\r\n", after=at))
    process.send("/think\r")
    at = process.wait_for("thinking is on", after=at)
    at = process.wait_for("> ", after=at)
    process.send("/nonsense\r")  # tells the error and goes on
    at = process.wait_for("dgemma: there is no command /nonsense", after=at)
    at = process.wait_for("> ", after=at)
    process.send("again\r")
    at = process.wait_for("step", after=at)
    process.send("\x03")
    at = process.wait_for("> ", after=process.wait_for("stopped", after=at))
    process.send("\x04")
    assert process.finish() == 0
    assert b"Traceback" not in process.raw


def test_turns_at_a_terminal_are_shown_one_below_the_other(small_model: Path):
    process = Process(["chat", str(small_model), "-n", "16"], rows=40)
    at = 0
    for text in ("one", "two"):
        at = process.wait_for("> ", after=at)
        process.send(text + "\r")
        at = process.wait_for("tok/s", after=at)
    process.wait_for("> ", after=at)
    process.send("/exit\r")
    assert process.finish() == 0
    starts = [line for line in process.lines if line.startswith("> ")]
    assert starts == ["> one", "> two", "> /exit"]
    assert len([line for line in process.lines if line.startswith("16 tokens")]) == 2
