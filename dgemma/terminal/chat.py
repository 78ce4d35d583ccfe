"""A conversation at the terminal: lines in, answers out, a few commands."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Union

from dgemma.terminal.attach import Content, Part, attached, content_of
from dgemma.terminal.screen import note

if TYPE_CHECKING:
    from dgemma.language_model import Chat
    from dgemma.terminal.remote import RemoteChat

HELP = """\
/reset        forget the conversation
/think        turn thinking on or off
/system TEXT  set the system message; without a text, remove it
/image FILE   show an image with the next message
/video FILE   show a video's frames with it
/exit         leave, as ctrl-D does
ctrl-C        stop an answer; the conversation stays as it was before the question"""


class Conversation:
    """Reads standard input line by line, to its end or to /exit.

    `answer` shows one answer: it takes what the user says and whether to think. At a terminal its errors are told and
    the conversation goes on; in a pipe they end it. shown: parts that go along with the first message.
    """

    def __init__(
        self,
        chat: Union["Chat", "RemoteChat"],
        answer: Callable[[Content, bool], None],
        think: bool = False,
        shown: Sequence[Part] = (),
    ):
        self.chat, self.answer, self.think = chat, answer, think
        self.shown = list(shown)
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
                    shown, self.shown = self.shown, []
                    self.answer(content_of(shown, text), self.think)
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
            case "/image" | "/video":
                files = [Path(rest.strip().strip("'\""))]
                self.shown += attached(files, []) if name == "/image" else attached([], files)
                note(f"{len(self.shown)} with the next message", faint=True)
            case "/system":
                self.set_system(rest.strip())
                note("the system message is set" if rest.strip() else "there is no system message", faint=True)
            case _:
                raise ValueError(f"there is no command {name}; /help lists them")

    def set_system(self, text: str) -> None:
        """Puts a system message before the turns so far, or removes it."""
        turns = [message for message in self.chat.messages if message["role"] != "system"]
        self.chat.messages = ([{"role": "system", "content": text}] if text else []) + turns
