"""A conversation at the terminal: lines in, answers out, a few commands."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Union

from dgemma.terminal.screen import note

if TYPE_CHECKING:
    from dgemma.language_model import Chat
    from dgemma.terminal.remote import RemoteChat

HELP = """\
/reset        forget the conversation
/think        turn thinking on or off
/system TEXT  set the system message; without a text, remove it
/exit         leave, as ctrl-D does
ctrl-C        stop an answer; the conversation stays as it was before the question"""


class Conversation:
    """Reads standard input line by line, to its end or to /exit.

    `answer` shows one answer: it takes the user's text and whether to think. At a terminal its errors are told and the
    conversation goes on; in a pipe they end it.
    """

    def __init__(self, chat: Union["Chat", "RemoteChat"], answer: Callable[[str, bool], None], think: bool = False):
        self.chat, self.answer, self.think = chat, answer, think
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()

    def run(self) -> None:
        if self.interactive:
            note(f"{self.chat.lm.name}: /help lists the commands, ctrl-D leaves", faint=True)
        for line in self._lines():
            text = line.strip()
            if text == "/exit":
                return
            try:
                if text.startswith("/") and text[1:].split(" ")[0].isalpha():
                    self._command(text)
                elif text:
                    self.answer(text, self.think)
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                note("stopped", faint=True)
            except (OSError, ValueError) as error:
                if not self.interactive or isinstance(error, BrokenPipeError):
                    raise
                note(f"dgemma: {error}")

    def _lines(self) -> Iterator[str]:
        if not self.interactive:
            yield from sys.stdin
            return
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  input() edits lines and remembers them once it is there
        while True:
            try:
                line = input("> ")
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print()
                continue
            yield line

    def _command(self, text: str) -> None:
        name, _, rest = text.partition(" ")
        match name:
            case "/help":
                note(HELP)
            case "/reset":
                self.chat.reset()
                note("forgotten", faint=True)
            case "/think":
                self.think = not self.think
                note(f"thinking is {'on' if self.think else 'off'}", faint=True)
            case "/system":
                self.set_system(rest.strip())
                note("the system message is set" if rest.strip() else "there is no system message", faint=True)
            case _:
                raise ValueError(f"there is no command {name}; /help lists them")

    def set_system(self, text: str) -> None:
        """Puts a system message before the turns so far, or removes it."""
        turns = [message for message in self.chat.messages if message["role"] != "system"]
        self.chat.messages = ([{"role": "system", "content": text}] if text else []) + turns
