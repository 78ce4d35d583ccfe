"""Draws docs/sudoku.svg, the README's picture, from a real run of the embedded model: `python docs/picture.py`."""

import re
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

import dgemma

PUZZLE = "016000090 450007200 008006731 069034005 045790000 000502409 001040007 000189300 080670000"
STYLES = {"accepted": "bold green", "changed": "yellow", "re-noised": "dim"}
FRAMES = 4


def frame(lm: dgemma.LanguageModel, step: dgemma.Step, before: dgemma.Step | None) -> Text:
    """The best canvas of a step; each token in the colour of what became of it."""
    text = Text()
    for i, token in enumerate(step.best.tolist()):
        changed = before is not None and step.best[i] != before.best[i]
        state = "changed" if changed else "accepted" if step.accepted[i] else "re-noised"
        shown = lm.tokenizer.decode([token], skip_special=True)
        text.append("\n" if shown == "\n" else f"{shown} " if shown.isdigit() else "", STYLES[state])
    return text


def main() -> None:
    lm = dgemma.load("sudoku")
    prompt = lm.task.prepare(PUZZLE) if lm.task else PUZZLE
    steps = [event for event in lm.stream(prompt) if isinstance(event, dgemma.Step)]
    answer = lm.generate(prompt)
    verdict = lm.task.check(prompt, answer.text) if lm.task else None
    chosen = sorted({round(i * (len(steps) - 1) / (FRAMES - 1)) for i in range(FRAMES)})
    table = Table(box=None, padding=(0, 2))
    table.add_column("puzzle")
    for i in chosen:
        table.add_column(f"step {i + 1}  H {steps[i].mean_entropy:.2f}")
    puzzle = "\n".join(" ".join(line).replace("0", "·") for line in prompt.splitlines())
    table.add_row(puzzle, *(frame(lm, steps[i], steps[i - 1] if i else None) for i in chosen))
    console = Console(record=True, width=24 * (len(chosen) + 1), file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    legend = [Text(f"{name}   ", style) for name, style in STYLES.items()]
    told = f"{len(steps)} steps, {answer.tokens_per_forward:.0f} tokens a step"
    console.print(*legend, f"{told}, {'right' if verdict and verdict.right else 'wrong'}", highlight=False)
    svg = console.export_svg(title="dgemma run sudoku")
    local = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)  # nothing is fetched to show it
    Path(__file__).with_name("sudoku.svg").write_text(local, encoding="utf-8")
    print(told, verdict, [round(step.mean_entropy, 3) for step in steps])


if __name__ == "__main__":
    main()
