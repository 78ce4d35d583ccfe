"""A JSONL file of conversations as a task: the last message of each is the answer, to be given word for word.

Its lines are those of a training file: {"messages", …} or {"prompt", "response"}. A file knows no rules by which
another answer could do, so only the reference is valid.
"""

from pathlib import Path

from dgemma.evals.tasks import Answer, Item, Score
from dgemma.media.prompt import rooted
from dgemma.text.messages import prepare_messages
from dgemma.train.data import Conversation, Pair, read_line

LEVELS = ("file",)


def read_items(path: str | Path) -> list[Item]:
    """The conversations of a file, blank lines skipped. ValueError names the first line that is none."""
    items = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    items.append(_item(read_line(line), Path(path).parent))
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{path}, line {number}: {error}") from None
    if not items:
        raise ValueError(f"{path} holds no conversations")
    return items


def check(item: Item, answer: Answer) -> Score:
    """exact and valid: the reference answer, but for white space around it."""
    same = answer.text.strip() == item.answer["content"].strip()
    return Score(same, same)


def _item(read: Conversation | Pair, folder: Path) -> Item:
    if isinstance(read, Pair):
        messages = ({"role": "user", "content": read.prompt}, {"role": "assistant", "content": read.response})
        return Item(messages, *LEVELS)
    *question, last = prepare_messages(read.messages)
    if not question or last["role"] != "assistant":
        raise ValueError("a question and, as the last message, the assistant's answer are expected")
    if not isinstance(last.get("content"), str) or last.get("tool_calls"):
        raise ValueError("the last message must be text without tool calls: nothing else can be compared word for word")
    return Item(tuple(rooted(read.messages, folder)), *LEVELS, read.tools, read.think)
