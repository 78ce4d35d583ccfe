"""An answer on its way to a reader: from the stream of events to text that stays and a canvas that moves."""

import sys
from collections.abc import Callable, Iterable, Iterator
from time import monotonic, sleep
from typing import TYPE_CHECKING

from dgemma.decoding.events import Block, Event, Finished, Prefilled, Step
from dgemma.terminal.canvas import CanvasText
from dgemma.terminal.layout import Piece, Row, Style, cells, flow, wrap
from dgemma.terminal.screen import Screen
from dgemma.text.output import ContentDelta, Increment, MarkedDecoder, OutputParser, ReasoningDelta
from dgemma.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from dgemma.language_model import Generation

FRAMES_A_SECOND = 15
LEGEND: list[Piece] = [("accepted", Style.ACCEPTED), ("changed", Style.CHANGED), ("re-noised", Style.RENOISED)]


class View:
    """Shows one answer: block by block, or with `visual` on a live terminal step by step.

    `pace`: seconds that each step stays on the screen at least, for models that are done before anyone has looked.
    Thoughts come dim before the answer on a terminal; otherwise they go to `aside`, and `out` gets the answer alone.
    """

    def __init__(
        self,
        screen: Screen,
        tokenizer: Tokenizer,
        ends: Iterable[int],
        visual: bool = False,
        aside: Screen | None = None,
        clock: Callable[[], float] = monotonic,
        pace: float = 0.0,
    ):
        self.screen, self.clock, self.pace = screen, clock, pace
        self.aside = screen if screen.tty else aside or Screen(sys.stderr)
        self.visual = visual and screen.live
        self.canvas = CanvasText(tokenizer, ends)
        self._decoder, self._parser = MarkedDecoder(tokenizer), OutputParser()
        self._thinking = False
        self._tail: list[Piece] = []  # settled text behind the last line break: still in the region
        self._step: Step | None = None
        self._before: Step | None = None
        self._drawn_at = self._begun = float("-inf")
        self._undrawn = False
        self._settled = 0

    def show(self, events: Iterable[Event]) -> Finished:
        """Shows events as they come. Whatever ends them early, the text so far stays and the cursor is below it."""
        try:
            for event in events:
                match event:
                    case Prefilled():
                        self._begun = self.clock()
                    case Step():
                        self._take(event)
                    case Block():
                        self._settle(event)
                    case Finished():
                        return event
        finally:
            self._close()
        raise ValueError("the stream of events ended without Finished")

    def _take(self, step: Step) -> None:
        self._before = self._step if self._step and self._step.block == step.block else None
        self._step, self._undrawn = step, True
        if self.visual and (self.pace or self.clock() - self._drawn_at >= 1 / FRAMES_A_SECOND):
            self._draw()
            sleep(self.pace)

    def _draw(self) -> None:
        assert self._step
        self._drawn_at, self._undrawn = self.clock(), False
        columns, height = self.screen.size
        status = self._status(self._step, max(1, columns - 1))
        rows = wrap([*self._tail, *self.canvas.pieces(self._step, self._before)], columns)
        room = max(1, height - len(status))
        if len(rows) > room:
            more = [(f"… {len(rows) - room + 1} more lines", Style.FAINT)]
            rows = [*rows[: room - 1], wrap(more, columns)[0]]
        self.screen.show((), [*rows, *status][-height:])

    def _status(self, step: Step, columns: int) -> list[Row]:
        done = self._settled + int(step.accepted[: len(self.canvas.kept(step))].sum())
        rate = done / max(1e-6, self.clock() - self._begun)
        parts = [
            f"block {step.block + 1}",
            f"step {step.step}",
            f"T {step.temperature:.2f}",
            f"H {step.mean_entropy:.3f}",
            f"{rate:.0f} tok/s",
        ]
        rows = flow(parts, columns)
        pieces = [[(row, Style.FAINT)] for row in rows]
        legend = [piece for entry in LEGEND for piece in ((" ", Style.PLAIN), entry)]
        if cells(rows[-1] + "".join(text for text, _ in legend)) <= columns:
            pieces[-1] += legend
        return [wrap(row, columns)[0] for row in pieces]

    def _settle(self, block: Block) -> None:
        if self.visual and self._undrawn:
            self._draw()
        self._settled += len(block.tokens)
        found: list[Increment] = []
        for token in block.tokens:
            text, mark = self._decoder.push(token)
            found += self._parser.push(text, plain=True) + self._parser.push(mark)
        self._pass_on(found)

    def _close(self) -> None:
        """Lets go of what was held back, clears the region and ends the last line."""
        self._pass_on([*self._parser.push(self._decoder.finish(), plain=True), *self._parser.finish()])
        self.screen.show(self._tail)
        self.screen.end_line()
        self.aside.end_line()

    def _pass_on(self, increments: Iterable[Increment]) -> None:
        pieces = list(self._styled(increments))
        if self.visual:
            self._scroll(pieces)
        elif self.aside is self.screen:
            self.screen.show(pieces)
        else:
            self.aside.show(piece for piece in pieces if piece[1] is Style.FAINT)
            self.screen.show(piece for piece in pieces if piece[1] is not Style.FAINT)

    def _styled(self, increments: Iterable[Increment]) -> Iterator[Piece]:
        """Thoughts are faint, and a blank line parts them from what follows."""
        for increment in increments:
            if isinstance(increment, ReasoningDelta):
                self._thinking = True
                yield increment.text, Style.FAINT
                continue
            if self._thinking:
                self._thinking = False
                yield "\n\n", Style.FAINT
            if isinstance(increment, ContentDelta):
                yield increment.text, Style.PLAIN
            else:
                yield f"{increment.name}({increment.arguments_json})\n", Style.PLAIN

    def _scroll(self, pieces: list[Piece]) -> None:
        """Whole lines go into the terminal's own text; the last one stays, since the next block continues it."""
        settled, self._tail = _split_at_last_break([*self._tail, *pieces])
        columns, height = self.screen.size
        rows = wrap(self._tail, max(1, columns - 1))
        if len(rows) > max(1, height // 2):  # a long paragraph: all rows that can no longer change go
            for row in rows[:-1]:
                settled += [*((c.text, c.style) for c in row), ("\n", Style.PLAIN)]
            rows = rows[-1:]
            self._tail = [(c.text, c.style) for c in rows[0]]
        self.screen.show(settled, rows if self._tail else ())


def _split_at_last_break(pieces: list[Piece]) -> tuple[list[Piece], list[Piece]]:
    for i in range(len(pieces) - 1, -1, -1):
        text, style = pieces[i]
        if "\n" in text:
            head, _, rest = text.rpartition("\n")
            return [*pieces[:i], (head + "\n", style)], [(rest, style), *pieces[i + 1 :]] if rest else pieces[i + 1 :]
    return [], pieces


def summary(result: "Generation", autoregressive: bool = False) -> list[str]:
    """What came of an answer, in a few words each."""
    tokens, steps, seconds = len(result.tokens), sum(result.steps), sum(result.seconds.values())
    parts = [
        f"{tokens} tokens",
        f"{steps} steps",
        f"{result.tokens_per_forward:.1f} tokens/forward",
        f"{tokens / max(1e-6, seconds):.0f} tok/s",
    ]
    if not autoregressive:
        capped = result.converged.count(False)
        blocks = len(result.converged)
        parts.append(f"{capped} of {blocks} blocks not converged" if capped else "converged")
    return parts + cut(result)


def cut(result: "Generation") -> list[str]:
    """Says so if the limit ended the answer."""
    if result.finish_reason != "length":
        return []
    whole = "" if result.text.strip() or not result.reasoning else ": the thoughts took all of it, no answer came"
    return [f"cut at {len(result.tokens)} tokens (--max-new-tokens){whole}"]
