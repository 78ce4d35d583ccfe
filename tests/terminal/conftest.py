"""Terminals to look at: an emulator that records every write, real pseudo-terminals for processes, small models."""

import fcntl
import io
import os
import pty
import select
import struct
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyte
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE

from dgemma.checkpoints.save import save_model
from dgemma.config import FULL, SLIDING, GenerationConfig, ModelConfig
from dgemma.decoding.events import Block, Event, Finished, Prefilled, Step
from dgemma.model.network import DiffusionGemma
from dgemma.text.small import SPECIAL, character_tokenizer
from dgemma.text.tokenizer import Tokenizer as DgemmaTokenizer

PATIENCE = 120.0
"""Seconds until a process counts as hung."""

END = 1
CANVAS = 400
"""Made-up canvases are filled up to this length with end tokens."""

NEVER = 100_000
"""An end token that no model here can write."""

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|turn>{{ m.role }}\n{{ m.content }}<turn|>\n{% endfor %}"
    "{% if enable_thinking %}<|think|>{% endif %}{% if add_generation_prompt %}<|turn>model\n{% endif %}"
)


class Emulator(io.StringIO):
    """Standard output as a person sees it. `writes` has each write; `screen` is what they come to."""

    def __init__(self, columns: int, rows: int, tty: bool = True):
        super().__init__()
        self.tty, self.writes = tty, list[str]()
        self.master, self.slave = pty.openpty()
        self.resize(columns, rows)

    def resize(self, columns: int, rows: int) -> None:
        """An empty screen of another size; what comes next is drawn there."""
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.screen = pyte.HistoryScreen(columns, rows, history=10_000, ratio=1)
        self.screen.set_mode(pyte.modes.LNM)  # as a terminal driver does: a line feed also returns
        self.stream = pyte.Stream(self.screen)

    def isatty(self) -> bool:
        return self.tty

    def fileno(self) -> int:
        return self.slave

    def write(self, text: str) -> int:
        self.writes.append(text)
        self.stream.feed(text)
        return len(text)

    @property
    def lines(self) -> list[str]:
        """What is on the screen, without blanks at the ends of lines and lines at the end."""
        lines = [line.rstrip() for line in self.screen.display]
        while lines and not lines[-1]:
            lines.pop()
        return lines

    @property
    def scrolled(self) -> list[str]:
        """What has left the screen at the top."""
        columns = self.screen.columns
        return ["".join(line[x].data for x in range(columns)).rstrip() for line in self.screen.history.top]

    def close_pty(self) -> None:
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def emulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Emulator]]:
    """Makes emulators of a number of columns and rows, with a TERM that can move its cursor and no NO_COLOR."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    made = []

    def make(columns: int = 80, rows: int = 24, tty: bool = True) -> Emulator:
        made.append(Emulator(columns, rows, tty))
        return made[-1]

    yield make
    for one in made:
        one.close_pty()


class Process:
    """A command in a terminal of its own."""

    def __init__(self, arguments: list[str], columns: int = 80, rows: int = 24, **environment: str):
        self.screen = pyte.HistoryScreen(columns, rows, history=10_000, ratio=1)
        self._stream = pyte.ByteStream(self.screen)
        self.raw = b""
        command = [sys.executable, "-m", "dgemma", *arguments]
        variables = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
        variables |= {"TERM": "xterm-256color", "OMP_NUM_THREADS": "1", **environment}
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
            os.execve(command[0], command, variables)

    def _read(self, seconds: float) -> bool:
        """Reads on; False at the end."""
        if not select.select([self._fd], [], [], seconds)[0]:
            return True
        try:
            data = os.read(self._fd, 1 << 16)
        except OSError:  # how Linux says that nobody has the other end
            return False
        self.raw += data
        self._stream.feed(data)
        return bool(data)

    def wait_for(self, text: str, after: int = 0) -> int:
        """Reads until `text` comes behind byte `after`; returns where it ends."""
        limit = time.monotonic() + PATIENCE
        while (at := self.raw.find(text.encode(), after)) < 0:
            assert time.monotonic() < limit, f"{text!r} did not come: {self.raw[-2000:]!r}"
            assert self._read(1.0), f"{text!r} did not come before the end: {self.raw[-2000:]!r}"
        return at + len(text.encode())

    def send(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def finish(self) -> int:
        """Reads to the end; the exit code."""
        limit = time.monotonic() + PATIENCE
        while self._read(1.0):
            assert time.monotonic() < limit, f"it does not end: {self.raw[-2000:]!r}"
        os.close(self._fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    @property
    def lines(self) -> list[str]:
        lines = [line.rstrip() for line in self.screen.display]
        while lines and not lines[-1]:
            lines.pop()
        return lines


@pytest.fixture(scope="session")
def wide_tokenizer() -> DgemmaTokenizer:
    """A tokenizer with one token a character (ASCII, CJK, emoji, a combining accent, escape), words, and bytes."""
    characters = [chr(code) for code in range(33, 127)] + list("漢字語👍👩\u200d\u0301\x1b\x9b\n\t")
    vocabulary = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *characters]
    backend = Tokenizer(BPE({token: i for i, token in enumerate(vocabulary)}, [], byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return DgemmaTokenizer(backend)


def make_step(
    best: list[int], number: int = 1, block: int = 0, accepted: list[bool] | None = None, still: bool = False
) -> Step:
    tokens = torch.full((CANVAS,), END)
    tokens[: len(best)] = torch.tensor(best)
    taken = torch.ones(CANVAS, dtype=torch.bool)
    if accepted is not None:
        taken[: len(best)] = torch.tensor(accepted)
    return Step(0, block, number, 0.75, tokens, tokens, taken, torch.zeros(CANVAS), 0.125, still)


def make_events(canvases: list[list[list[int]]], texts: list[list[int]] | None = None) -> list[Event]:
    """A whole stream: for each block the best canvas of each step, and what it gains (its last canvas, if not told)."""
    texts = texts or [steps[-1] for steps in canvases]
    events: list[Event] = [Prefilled(0, 3, 0, 0.01)]
    for block, (steps, text) in enumerate(zip(canvases, texts, strict=True)):
        events += [make_step(best, n, block, still=n == len(steps)) for n, best in enumerate(steps, 1)]
        events.append(Block(0, block, text, len(steps), True, 0.5))
    counts = [len(steps) for steps in canvases]
    whole = [token for text in texts for token in text]
    return [*events, Finished(0, whole, "stop", counts, [True] * len(counts), 3, 0.1, 1.0, 0.1)]


def small_config(**changes: object) -> ModelConfig:
    sizes = {
        "vocab_size": 128,
        "hidden_size": 16,
        "intermediate_size": 16,
        "moe_intermediate_size": 8,
        "num_experts": 2,
        "top_k_experts": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "num_global_key_value_heads": 1,
        "global_head_dim": 8,
        "layer_types": (SLIDING, FULL),
        "sliding_window": 32,
        "canvas_length": 16,
        "max_position_embeddings": 20_000,
        "dtype": "float32",
        "initializer_range": 0.3,
    }
    return ModelConfig(**{**sizes, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a small random model that writes ASCII and never ends by itself."""
    directory = tmp_path_factory.mktemp("models") / "small"
    model = DiffusionGemma(small_config()).init_weights(0).eval()
    save_model(model, directory, GenerationConfig(max_new_tokens=40, eos_token_id=(NEVER,)))
    character_tokenizer().save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
    return directory
