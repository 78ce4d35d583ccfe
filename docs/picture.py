"""Draws docs/sudoku.svg, the README's picture, from a real run of the embedded model: `python docs/picture.py`."""

from pathlib import Path

import dgemma
from dgemma.terminal.canvas import CanvasText
from dgemma.terminal.export import Panel, strip
from dgemma.terminal.layout import Piece, Style, wrap

PUZZLE = "016000090 450007200 008006731 069034005 045790000 000502409 001040007 000189300 080670000"
FRAMES = 4


def panel(heading: str, pieces: list[Piece]) -> Panel:
    """A grid with blanks between its cells."""
    spaced = [(text if text == "\n" else f"{text} ", style) for text, style in pieces]
    return Panel(heading, wrap(spaced, 80))


def main() -> None:
    lm = dgemma.load("sudoku")
    prompt = lm.task.prepare(PUZZLE) if lm.task else PUZZLE
    steps = [event for event in lm.stream(prompt) if isinstance(event, dgemma.Step)]
    answer = lm.generate(prompt)
    verdict = lm.task.check(prompt, answer.text) if lm.task else None
    canvas = CanvasText(lm.tokenizer, lm.defaults.eos_token_id)
    panels = [panel("puzzle", [(c, Style.PLAIN) for c in prompt.replace("0", "·")])]
    for i in sorted({round(i * (len(steps) - 1) / (FRAMES - 1)) for i in range(FRAMES)}):
        pieces = canvas.pieces(steps[i], steps[i - 1] if i else None)
        panels.append(panel(f"step {i + 1}  H {steps[i].mean_entropy:.2f}", pieces))
    told = f"{len(steps)} steps, {answer.tokens_per_forward:.0f} tokens a step"
    note = f"{told}, {'right' if verdict and verdict.right else 'wrong'}"
    Path(__file__).with_name("sudoku.svg").write_text(strip("dgemma run sudoku", panels, note), encoding="utf-8")
    print(told, verdict, [round(step.mean_entropy, 3) for step in steps])


if __name__ == "__main__":
    main()
