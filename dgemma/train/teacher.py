"""A model as its own slow teacher: its answers to training questions, those that the task's rule accepts, as JSONL."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dgemma.evals.measure import measure
from dgemma.evals.tasks import Item, Task, items
from dgemma.language_model import LanguageModel

LINES_AT_ONCE = 64


def teach(
    lm: LanguageModel,
    task: Task,
    levels: tuple[str, ...],
    count: int,
    path: Path,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> int:
    """Writes conversations whose answers are the model's own and valid, until `count` questions have been asked.

    None of them is held out. options: fields of GenerationConfig; a smaller entropy_bound makes a slower and better
    teacher. progress: told questions asked and answers kept. Returns how many were kept; ValueError if none was.
    """
    kept = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for asked in range(0, count, LINES_AT_ONCE):
            size = min(LINES_AT_ONCE, count - asked)
            level = levels[asked // LINES_AT_ONCE % len(levels)]
            questions = items(task, size, seed + asked, held_out=False, level=level)
            for result in measure(lm, questions, task, LINES_AT_ONCE, seed + asked, **options):
                if result.score.valid:
                    file.write(json.dumps(_line(result.item, result.answer), ensure_ascii=False) + "\n")
                    kept += 1
            if progress:
                progress(asked + size, kept)
    if not kept:
        raise ValueError(f"the model gave no valid answer to {count} questions: there is nothing to learn from it")
    return kept


def _line(item: Item, answer: Any) -> dict[str, Any]:
    said: dict[str, Any] = {"role": "assistant", "content": answer.text}
    if answer.reasoning:
        said["reasoning"] = answer.reasoning
    if answer.tool_calls:
        calls = [{"name": call.name, "arguments": call.arguments} for call in answer.tool_calls]
        said["tool_calls"] = [{"type": "function", "function": call} for call in calls]
    line: dict[str, Any] = {"messages": [*map(dict, item.question), said]}
    return line | ({"tools": [*map(dict, item.tools)]} if item.tools else {}) | ({"think": True} if item.think else {})
