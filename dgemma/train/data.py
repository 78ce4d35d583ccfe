"""From conversations to token sequences whose targets are the model's turns, behind the very prompts of inference."""

import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dgemma.config import MediaConfig, ModelConfig
from dgemma.media.prompt import media_of, opened, prompted, quiet, rooted, shows
from dgemma.media.sources import Sources
from dgemma.picture import Placed, Prompted
from dgemma.text.chat import ChatTemplate
from dgemma.text.messages import prepare_messages
from dgemma.text.output import ENDS, THOUGHT, THOUGHT_END
from dgemma.text.tokenizer import Tokenizer

Message = Mapping[str, Any]

HEADER = "<|turn>model\n"
NOTES = {"id", "metadata"}
CHAT = {"messages", "tools", "think", "enable_thinking"}
PAIR = {"prompt", "response", "completion"}


@dataclass(frozen=True)
class Target:
    """A turn of the model in an example: tokens[start:stop] are what it writes, its end-of-turn token included."""

    start: int
    stop: int
    complete: bool
    """False: cut at the length limit, so nothing is known of what follows."""


@dataclass(frozen=True)
class Example:
    """One sequence, 4 bytes a token, the model's turns in it and the pictures that it shows, both in order."""

    tokens: "array[int]"
    targets: tuple[Target, ...]
    pictures: tuple[Placed, ...] = ()


@dataclass(frozen=True)
class Conversation:
    """Messages, tools and think as for `LanguageModel.generate`; every assistant message is to be learnt."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    think: bool = False


@dataclass(frozen=True)
class Pair:
    """A prompt and what the model should write: a user's message and its answer, or plain text without a template."""

    prompt: str
    response: str


@dataclass(frozen=True)
class BadLine:
    """A line of a file that is no example, counted from 1, and why."""

    number: int
    reason: str


def examples(
    data: Conversation | Pair,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    limit: int,
    canvas: int,
    config: ModelConfig | None = None,
    folder: Path | None = None,
) -> list[Example]:
    """The model's turns; those whose prompt continues an earlier turn share its sequence.

    limit: the most tokens of an example, without what fills its last canvas. A turn that does not fit is cut to whole
    canvases, and later ones that have no room for one are left out. ValueError if the first has none, or names the
    message that is wrong. config: of a network that takes images and videos, which are read from paths that begin in
    `folder`; without it there may be none.
    """
    found: list[Example] = []
    if isinstance(data, Conversation) and shows(data.messages):
        if config is None:
            raise ValueError("messages: images and video are not taken here")
        rootless = rooted(data.messages, folder) if folder else data.messages
        shown = opened(rootless, config, MediaConfig.of(config), Sources(), held=False)
        data = replace(data, messages=tuple(quiet(shown, tokenizer, config)))
    for prompt, response, pictures in _turns(data, tokenizer, template, config):
        if len(prompt) > limit - canvas:
            if not found:
                raise ValueError(
                    f"the prompt is {len(prompt)} tokens long; at most {limit - canvas} leave room for a canvas of "
                    f"{canvas} in {limit}"
                )
            continue
        room = limit - len(prompt)
        complete = len(response) <= room
        response = response if complete else response[: room // canvas * canvas]
        target = Target(len(prompt), len(prompt) + len(response), complete)
        earlier: tuple[Target, ...] = ()
        if found and prompt[: len(found[-1].tokens)] == found[-1].tokens:
            earlier = found.pop().targets
        found.append(Example(prompt + response, (*earlier, target), pictures))
    return found


def canvases(target: Target, tokens: Sequence[int], canvas: int, fill: int) -> list[tuple[int, list[int]]]:
    """The canvases of a target: where each begins, and its `canvas` tokens, the last one's rest being `fill`."""
    pieces = []
    for start in range(target.start, target.stop, canvas):
        piece = list(tokens[start : min(start + canvas, target.stop)])
        pieces.append((start, piece + [fill] * (canvas - len(piece))))
    return pieces


def load_jsonl(
    path: str | Path,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    limit: int,
    canvas: int,
    config: ModelConfig | None = None,
) -> tuple[list[Example], list[BadLine]]:
    """The examples of a file with one JSON object a line, and the lines that are none; blank lines are skipped.

    Paths of images and videos begin in the file's folder. Every image is opened once, so that a damaged one is a bad
    line, and read again when it is its turn.

    ValueError if no line is an example, OSError if the file cannot be read.
    """
    found: list[Example] = []
    bad: list[BadLine] = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                found += examples(read_line(line), tokenizer, template, limit, canvas, config, Path(path).parent)
            except (ValueError, RecursionError) as error:
                bad.append(BadLine(number, str(error)))
    if not found:
        why = f"the first bad line is {bad[0].number}: {bad[0].reason}" if bad else "it is empty"
        raise ValueError(f"{path}: there is no example in it; {why}")
    return found, bad


def read_line(line: bytes) -> Conversation | Pair:
    """A line of a JSONL file: {"messages", "tools", "think" or "enable_thinking"}, or {"prompt", "response"}.

    "completion" stands for "response", "id" and "metadata" are passed over, null is as good as absent. ValueError says
    what is wrong; what a message holds is checked by `examples`.
    """
    try:
        given = json.loads(line.decode("utf-8-sig"))
        json.dumps(given, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("an escape is half of a surrogate pair, which is no character") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}") from error
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(given, dict):
        raise ValueError(f"a JSON object is expected, not {type(given).__name__}")
    known = CHAT if "messages" in given else PAIR
    if unknown := given.keys() - known - NOTES:
        raise ValueError(f"{min(unknown)!r} is not known here; known are {', '.join(sorted(known | NOTES))}")
    fields = {name: value for name, value in given.items() if value is not None}
    if known is PAIR:
        response = _one(fields, "response", "completion", str)
        prompt = _one(fields, "prompt", "prompt", str)
        if prompt is None or response is None:
            raise ValueError('"messages", or "prompt" and "response", are expected')
        return Pair(prompt, response)
    messages = _one(fields, "messages", "messages", list)
    tools = _one(fields, "tools", "tools", list)
    think = _one(fields, "think", "enable_thinking", bool)
    return Conversation(tuple(messages or ()), tuple(tools or ()), think or False)


def _one(fields: Mapping[str, Any], name: str, other: str, kind: type) -> Any:
    """The field of either name, None if there is none; ValueError for two, or for one of another type."""
    if other != name and name in fields and other in fields:
        raise ValueError(f'"{name}" and "{other}" mean the same; give one')
    value = fields.get(name, fields.get(other))
    if value is not None and not isinstance(value, kind):
        raise ValueError(f'"{name if name in fields else other}": {kind.__name__} is expected, not {value!r:.40}')
    return value


def _turns(
    data: Conversation | Pair, tokenizer: Tokenizer, template: ChatTemplate | None, config: ModelConfig | None
) -> "Iterator[tuple[array[int], array[int], tuple[Placed, ...]]]":
    """Prompt and response of each of the model's turns, in tokens, and the pictures in the prompt."""
    if isinstance(data, Pair) and template is None:
        if tokenizer.bos_id is None or tokenizer.eos_id is None:
            raise ValueError(
                "the tokenizer has no bos and eos token, which text without a chat template stands between"
            )
        prompt = [tokenizer.bos_id, *tokenizer.encode(data.prompt)]
        yield array("i", prompt), array("i", [*tokenizer.encode(data.response), tokenizer.eos_id]), ()
        return
    if template is None:
        raise ValueError("the model has no chat template: give prompt and response instead of messages")
    if isinstance(data, Pair):
        question, answer = {"role": "user", "content": data.prompt}, {"role": "assistant", "content": data.response}
        data = Conversation((question, answer))
    roles = [message["role"] for message in prepare_messages(data.messages)]
    if "assistant" not in roles:
        raise ValueError("messages: there is none of the role 'assistant' to learn from")
    if roles[0] == "assistant":
        raise ValueError("messages[0] is the model's own: a message that it answers must come first")
    for index, role in enumerate(roles):
        if role == "assistant":
            asked, said = _turn(data, index, tokenizer, template)
            shown = media_of(data.messages[:index])
            read = prompted(asked, shown, tokenizer, config) if config else Prompted(tokenizer.encode(asked))
            yield array("i", read.tokens), array("i", tokenizer.encode(said)), read.pictures


def _turn(data: Conversation, index: int, tokenizer: Tokenizer, template: ChatTemplate) -> tuple[str, str]:
    """The prompt of messages[index] as inference renders it, and what the model should write then."""

    def render(messages: Sequence[Message], prompt: bool = False) -> str:
        return template.render(
            messages, data.tools, enable_thinking=data.think, add_generation_prompt=prompt, plain=tokenizer.plain
        )

    before, message = data.messages[:index], dict(data.messages[index])
    thoughts = [message.pop(name, None) for name in ("reasoning", "reasoning_content")]
    thought = thoughts[0] or thoughts[1]
    settled, whole = render(before), render([*before, message])
    if not whole.startswith(settled):
        raise ValueError(f"messages[{index}]: the chat template renders what comes before it in another way after it")
    # What the prompt opens the turn with is not learnt; history has no more of it than the header.
    said = whole[len(settled) :].removeprefix(HEADER).removesuffix("\n")
    if not said.endswith(ENDS):
        raise ValueError(f"messages[{index}]: the chat template ends the turn with none of {', '.join(ENDS)}")
    # The form that templates give to the thought before a call: with it the next prompt continues this turn.
    return render(before, prompt=True), f"{THOUGHT}thought\n{thought}\n{THOUGHT_END}{said}" if thought else said
