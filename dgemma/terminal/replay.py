"""Traces and their text: recording one while a generation is shown, showing it again without the model."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dgemma.config import GenerationConfig
from dgemma.decoding.events import Block, Event, Finished, Step
from dgemma.decoding.trace import Header, Token, Trace, Writer
from dgemma.terminal.canvas import CanvasText
from dgemma.terminal.screen import Screen
from dgemma.terminal.view import View
from dgemma.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from dgemma.language_model import LanguageModel


def recorded(
    events: Iterable[Event], path: Path, lm: "LanguageModel", prompt_tokens: list[int], options: dict[str, Any]
) -> Iterator[Event]:
    """The same events, each in the file before it is passed on. options: as `LanguageModel.stream` takes them."""
    known = {f.name for f in fields(GenerationConfig)}
    config = lm.defaults.with_options(**{name: value for name, value in options.items() if name in known})
    mode = {name: value for name, value in options.items() if name not in known and name != "seed"}
    network = lm.model.config
    header = Header(
        lm.name, network.vocab_size, network.canvas_length, asdict(config) | mode, options["seed"], prompt_tokens
    )
    with path.open("wb") as file:
        writer = Writer(file, header, describer(lm.tokenizer))
        for event in events:
            writer.write(event)
            yield event


def describer(tokenizer: Tokenizer) -> Callable[[int], Token]:
    """How the tokens of a tokenizer read."""

    def describe(id: int) -> Token:
        if id in tokenizer.byte_ids:
            return Token(id, tokenizer.token(id), "byte")
        return Token(id, tokenizer.decode([id]), "special" if id in tokenizer.special_ids else "text")

    return describe


class Spellings:
    """The part of a Tokenizer that showing text takes, from a trace. A token that it lacks has no text."""

    def __init__(self, tokens: Mapping[int, Token]):
        self.texts = {i: token.text for i, token in tokens.items()}
        self.special_ids = frozenset(i for i, token in tokens.items() if token.kind == "special")
        self.byte_ids = frozenset(i for i, token in tokens.items() if token.kind == "byte")

    def id(self, token: str) -> int | None:
        """Of a special token."""
        return next((i for i in self.special_ids if self.texts[i] == token), None)

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        kept = [i for i in ids if not (skip_special and i in self.special_ids)]
        runs = groupby(kept, key=self.byte_ids.__contains__)
        return "".join(
            self._character(run) if byte else "".join(self.texts.get(i, "") for i in run) for byte, run in runs
        )

    def _character(self, run: Iterable[int]) -> str:
        data = bytes(int(self.texts[i][3:5], 16) for i in run)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(data)  # as the tokenizers do it: one bad byte spoils its run


@dataclass(frozen=True)
class Recording:
    """One row of a trace, ready to be shown: its events up to Finished, and how its tokens read."""

    header: Header
    events: list[Event]
    tokenizer: Tokenizer
    ends: tuple[int, ...]

    @property
    def steps(self) -> list[tuple[Step, Step | None]]:
        """Each step with the one before it on the same canvas."""
        steps = [event for event in self.events if isinstance(event, Step)]
        before = [None, *steps]
        return [(s, b if b and b.block == s.block else None) for s, b in zip(steps, before, strict=False)]

    def settled(self, block: int) -> str:
        """The text in front of a block, without special tokens."""
        blocks = [event for event in self.events if isinstance(event, Block) and event.block < block]
        return self.tokenizer.decode([i for b in blocks for i in b.tokens], skip_special=True)


def recording(trace: Trace, row: int | None = None) -> Recording:
    """A row of a trace, the first one if not told. Of a cut trace, what the last step would have committed ends it."""
    rows = list(dict.fromkeys(event.row for event in trace.events))
    if row is not None and row not in rows:
        raise ValueError(f"the trace has no row {row}, only {', '.join(map(str, rows)) or 'a header'}")
    row = rows[0] if rows and row is None else row or 0
    # Nothing that shows text asks for more of a tokenizer.
    tokenizer = cast(Tokenizer, Spellings(trace.tokens))
    header = trace.header_of(row)
    ends = GenerationConfig.from_dict(header.options).eos_token_id
    events = [event for event in trace.events if event.row == row]
    last = events[-1] if events else None
    if isinstance(last, Step):
        kept = CanvasText(tokenizer, ends).kept(last)
        events.append(Block(row, last.block, kept, last.step, last.still, 0.0))
    if not isinstance(last, Finished):
        blocks = [event for event in events if isinstance(event, Block)]
        tokens = [i for block in blocks for i in block.tokens]
        counts, still = [block.steps for block in blocks], [block.converged for block in blocks]
        prompt = len(header.prompt_tokens)
        events.append(Finished(row, tokens, "length", counts, still, prompt, 0.0, 0.0, 0.0))
    return Recording(header, events, tokenizer, ends)


def replay(shown: Recording, pace: float) -> None:
    """Shows it again as `run --visual` does, `pace` seconds a step; to a pipe, the text alone."""
    View(Screen(sys.stdout), shown.tokenizer, shown.ends, visual=True, pace=pace).show(shown.events)
