"""Training data: prompts as inference makes them, responses that are parsed back, cuts, and files with bad lines."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dgemma.embedded
from dgemma.config import GenerationConfig
from dgemma.language_model import LanguageModel
from dgemma.model.network import DiffusionGemma
from dgemma.text.chat import ChatTemplate
from dgemma.text.output import parse
from dgemma.text.small import bpe_tokenizer
from dgemma.text.tokenizer import Tokenizer
from dgemma.train.data import Conversation, Example, Pair, canvases, examples, load_jsonl, read_line

Message = dict[str, Any]
Model = tuple[Tokenizer, ChatTemplate]

TEXT = st.lists(st.sampled_from([*'aZ"{}<|>,: \n1ü', "turn"]), max_size=8).map("".join)
NAME = st.sampled_from(["a", "B", "city", "x_y"])
SCALAR = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT
VALUE = st.recursive(SCALAR, lambda v: st.lists(v, max_size=2) | st.dictionaries(NAME, v, max_size=2), max_leaves=4)
THOUGHTS = st.fixed_dictionaries({}, optional={"reasoning": TEXT, "reasoning_content": TEXT})
TOOL = {"type": "function", "function": {"name": "f", "description": "F", "parameters": {"type": "object"}}}


def called(name: str, arguments: Any, id: str = "1") -> Message:
    return {"type": "function", "id": id, "function": {"name": name, "arguments": arguments}}


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    system = {"role": "system", "content": draw(TEXT)}
    messages: list[Message] = [system, {"role": "user", "content": "Hi"}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(TEXT | st.just("<turn|>\n<|turn>model\n"))})
        for _ in range(draw(st.integers(0, 2))):
            arguments = draw(st.lists(st.dictionaries(NAME, VALUE, max_size=2), min_size=1, max_size=2))
            calls = [called("f", a, str(i)) for i, a in enumerate(arguments)]
            results = [{"role": "tool", "tool_call_id": str(i), "content": draw(TEXT)} for i in range(len(calls))]
            content = draw(TEXT) if draw(st.integers(0, 3)) == 0 else None
            messages += [{"role": "assistant", "content": content, "tool_calls": calls, **draw(THOUGHTS)}, *results]
        messages.append({"role": "assistant", "content": draw(TEXT), **draw(THOUGHTS)})
    return Conversation(tuple(messages), (TOOL,) if draw(st.booleans()) else (), draw(st.booleans()))


def language_model(tokenizer: Tokenizer, template: ChatTemplate | None) -> LanguageModel:
    """As far as prompts go, which need no network."""
    return LanguageModel("test", cast(DiffusionGemma, None), tokenizer, template, GenerationConfig())


def text_of(example: Example, tokenizer: Tokenizer) -> list[str]:
    """The sequence in pieces: what stands before a target, the target, and so on."""
    cuts = [0, *(cut for target in example.targets for cut in (target.start, target.stop))]
    return [tokenizer.decode(example.tokens[a:b]) for a, b in pairwise(cuts)]


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return Tokenizer(bpe_tokenizer(["user model system thought call response turn"] * 2, size=400))


@pytest.fixture(scope="module")
def tiny() -> ChatTemplate:
    template = ChatTemplate.from_directory(Path(dgemma.embedded.__file__).parent / "tiny")
    assert template is not None
    return template


@pytest.fixture(scope="module", params=["tiny", "chat_template_v1", "chat_template_v2"])
def model(request: pytest.FixtureRequest, small: Tokenizer, tiny: ChatTemplate) -> Model:
    if request.param == "tiny":
        return small, tiny
    shared: Path = request.getfixturevalue("shared")
    template = ChatTemplate((shared / f"{request.param}.jinja").read_text("utf-8"))
    return request.getfixturevalue("released"), template


@pytest.fixture(scope="module")
def released(shared: Path) -> Tokenizer:
    return Tokenizer.from_directory(shared)


@settings(max_examples=40, deadline=None)
@given(conversations())
def test_prompts_are_those_of_inference_and_responses_are_parsed_back(model: Model, conversation: Conversation) -> None:
    tokenizer, template = model
    lm = language_model(tokenizer, template)
    found = examples(conversation, tokenizer, template, limit=100_000, canvas=8)
    turns = [(example.tokens, target) for example in found for target in example.targets]
    messages = [cast(Message, message) for message in conversation.messages]
    spoken = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for index, (tokens, target) in zip(spoken, turns, strict=True):
        message = messages[index]
        prompt = lm.tokens(
            messages[:index], think=conversation.think, tools=[dict(tool) for tool in conversation.tools]
        )
        assert tokens[: target.start].tolist() == prompt
        said = parse(tokenizer.decode(tokens[target.start : target.stop]))
        assert said.problems == []
        assert said.complete
        assert said.content == (message.get("content") or "").strip()
        assert said.reasoning == (message.get("reasoning") or message.get("reasoning_content") or "")
        calls = [call["function"] for call in message.get("tool_calls", ())]
        assert [{"name": call.name, "arguments": call.arguments} for call in said.tool_calls] == calls
        assert target.complete
        assert tokens[target.stop - 1] == tokenizer.id("<|tool_response>" if calls else "<turn|>")


WEATHER: tuple[Message, ...] = (
    {"role": "user", "content": "Sun?"},
    {"role": "assistant", "reasoning": "look", "tool_calls": [called("see", {"x": 1})]},
    {"role": "tool", "content": "yes", "tool_call_id": "1"},
    {"role": "assistant", "content": "Sun."},
    {"role": "user", "content": "Rain?"},
    {"role": "assistant", "reasoning": "no sun", "content": "Rain."},
)
THOUGHT = "<|channel>thought\nlook\n<channel|>"
SEEN = 'response:see{value:<|"|>yes<|"|>}<tool_response|>'
CALL = "<|tool_call>call:see{x:1}<tool_call|><|tool_response>"
ASKED = "<bos><|turn>user\nSun?<turn|>\n<|turn>model\n"
HISTORY = f"{ASKED}{CALL}{SEEN}Sun.<turn|>\n<|turn>user\nRain?<turn|>\n<|turn>model\n"
RAIN = "<|channel>thought\nno sun\n<channel|>Rain.<turn|>"


def test_turns_that_continue_share_a_sequence(small: Tokenizer, tiny: ChatTemplate) -> None:
    found = examples(Conversation(WEATHER), small, tiny, limit=1000, canvas=16)
    assert [text_of(example, small) for example in found] == [
        [ASKED, THOUGHT + CALL, SEEN, "Sun.<turn|>"],
        [HISTORY, RAIN],  # the template has dropped the thought
    ]
    plain = tuple({name: value for name, value in m.items() if name != "reasoning"} for m in WEATHER)
    (one,) = examples(Conversation(plain), small, tiny, limit=1000, canvas=16)
    between = "\n<|turn>user\nRain?<turn|>\n<|turn>model\n"
    assert text_of(one, small) == [ASKED, CALL, SEEN, "Sun.<turn|>", between, "Rain.<turn|>"]


def test_an_empty_thought_in_the_prompt_parts_sequences(released: Tokenizer, shared: Path) -> None:
    v1 = ChatTemplate((shared / "chat_template_v1.jinja").read_text("utf-8"))
    empty = "<|channel>thought\n<channel|>"
    found = examples(Conversation(WEATHER), released, v1, limit=1000, canvas=16)
    assert [text_of(example, released) for example in found] == [
        [ASKED + empty, THOUGHT + CALL],
        [ASKED + THOUGHT + CALL + SEEN, "Sun.<turn|>"],
        [HISTORY + empty, RAIN],
    ]


def test_an_answer_may_be_empty_and_may_follow_another(small: Tokenizer, tiny: ChatTemplate) -> None:
    messages = ({"role": "user", "content": "a"}, *({"role": "assistant", "content": c} for c in ("", "b")))
    (example,) = examples(Conversation(messages), small, tiny, limit=100, canvas=4)
    assert text_of(example, small)[1:] == ["<turn|>", "\n<|turn>model\n", "b<turn|>"]
    target = example.targets[0]
    assert canvases(target, example.tokens, 4, 0) == [(target.start, [small.id("<turn|>"), 0, 0, 0])]


@given(prompt=st.integers(0, 40), response=st.integers(0, 60), limit=st.integers(1, 90), canvas=st.integers(1, 30))
def test_limit(small: Tokenizer, prompt: int, response: int, limit: int, canvas: int) -> None:
    pair = Pair("1" * prompt, "2" * response)
    if prompt + 1 > limit - canvas:
        with pytest.raises(ValueError, match=f"the prompt is {prompt + 1} tokens long; at most {limit - canvas} "):
            examples(pair, small, None, limit, canvas)
        return
    (example,) = examples(pair, small, None, limit, canvas)
    (target,) = example.targets
    whole = [small.bos_id, *small.encode(pair.prompt + pair.response), small.eos_id]
    tokens = example.tokens.tolist()
    assert tokens == whole[: target.stop]
    assert target.start == prompt + 1
    assert target.stop == len(tokens) <= limit
    assert target.complete == (len(whole) <= limit)
    pieces = canvases(target, example.tokens, canvas, fill=-1)
    assert [start for start, _ in pieces] == list(range(target.start, target.stop, canvas))
    assert {len(piece) for _, piece in pieces} == {canvas}
    written = [token for _, piece in pieces for token in piece]
    assert written[: target.stop - target.start] == tokens[target.start :]
    rest = written[target.stop - target.start :]
    assert len(rest) < canvas
    assert set(rest) <= {-1}
    if not target.complete:
        assert not rest
        assert limit - target.stop < canvas


def test_turns_behind_a_cut_are_left_out(small: Tokenizer, tiny: ChatTemplate) -> None:
    said = [{"role": role, "content": "1" * 20} for _ in range(3) for role in ("user", "assistant")]
    (whole,) = examples(Conversation(tuple(said)), small, tiny, 1000, 8)
    first, second, _ = whole.targets
    for limit in range(first.start + 8, len(whole.tokens)):
        (cut,) = examples(Conversation(tuple(said)), small, tiny, limit, 8)
        assert cut.tokens == whole.tokens[: len(cut.tokens)]
        assert len(cut.tokens) <= limit
        assert all(target in whole.targets for target in cut.targets if target.complete)
        assert all(target.complete for target in cut.targets[:-1])
        assert (second in cut.targets) == (limit >= second.stop)


def test_a_later_turn_whose_prompt_has_lost_a_long_thought_stays(small: Tokenizer, tiny: ChatTemplate) -> None:
    said = {"role": "assistant", "reasoning": "1" * 100, "content": "2"}
    messages = ({"role": "user", "content": "a"}, said, {"role": "user", "content": "b"}, {**said, "reasoning": None})
    first, second = examples(Conversation(messages), small, tiny, limit=80, canvas=8)
    assert [first.targets[0].complete, second.targets[0].complete] == [False, True]
    assert text_of(second, small)[-1] == "2<turn|>"


USER = {"role": "user", "content": "x"}
MODEL = {"role": "assistant", "content": "y"}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ((), "messages: a list of at least one message"),
        ((USER,), "none of the role 'assistant'"),
        ((MODEL,), r"messages\[0\] is the model's own"),
        ((USER, {"role": "model", "content": "y"}), r"messages\[1\]\.role 'model' is not known"),
        ((USER, MODEL, {"role": "user", "content": 1}), r"messages\[2\]\.content"),
    ],
)
def test_conversations_that_are_none(
    small: Tokenizer, tiny: ChatTemplate, messages: tuple[Message, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        examples(Conversation(messages), small, tiny, 100, 8)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ messages | length }}<turn|>", r"messages\[1\]: the chat template renders what comes before it in another"),
        (
            "{{ messages | map(attribute='content') | join }}",
            r"messages\[1\]: the chat template ends the turn with none",
        ),
    ],
)
def test_templates_that_cannot_be_learnt_from(small: Tokenizer, source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        examples(Conversation((USER, MODEL)), small, ChatTemplate(source), 100, 8)


def test_without_a_template(small: Tokenizer) -> None:
    (example,) = examples(Pair("ab ", "c\n"), small, None, 20, 4)
    assert text_of(example, small) == ["<bos>ab ", "c\n<eos>"]
    with pytest.raises(ValueError, match="no chat template: give prompt and response"):
        examples(Conversation((USER, MODEL)), small, None, 20, 4)


def test_a_pair_is_a_user_message_and_its_answer(small: Tokenizer, tiny: ChatTemplate) -> None:
    assert examples(Pair("x", "y"), small, tiny, 90, 8) == examples(Conversation((USER, MODEL)), small, tiny, 90, 8)


def test_lines() -> None:
    chat = Conversation((USER, MODEL))
    messages: dict[str, Any] = {"messages": [USER, MODEL]}
    for given_, wanted in (
        (messages, chat),
        ({**messages, "tools": None, "think": None, "id": 7, "metadata": {"a": 1}}, chat),
        ({**messages, "tools": [TOOL], "enable_thinking": True}, Conversation((USER, MODEL), (TOOL,), True)),
        ({**messages, "think": True}, Conversation((USER, MODEL), (), True)),
        ({"prompt": "x", "response": "y"}, Pair("x", "y")),
        ({"prompt": "", "completion": "", "id": "z"}, Pair("", "")),
    ):
        assert read_line(json.dumps(given_).encode()) == wanted
    assert read_line("\ufeff".encode() + b'{"prompt": "x", "response": "y"}\r\n') == Pair("x", "y")


BAD: list[tuple[bytes, str]] = [
    (b"{", "not JSON"),
    (b'{"prompt": "\xff", "response": "y"}', "not UTF-8: invalid start byte at byte 12"),
    (b"[]", "a JSON object is expected, not list"),
    (b"[" * 100_000, "recursion"),
    (b"{}", '"messages", or "prompt" and "response", are expected'),
    (b'{"prompt": "x"}', "are expected"),
    (b'{"prompt": "x", "response": 1}', '"response": str is expected, not 1'),
    (b'{"prompt": "x", "completion": 1}', '"completion": str is expected, not 1'),
    (b'{"prompt": "x", "response": "y", "completion": "z"}', "mean the same"),
    (b'{"prompt": "x", "response": "y", "tools": []}', "'tools' is not known here; known are completion, id"),
    (b'{"messages": [], "text": "x"}', "'text' is not known here; known are enable_thinking"),
    (b'{"messages": {}}', '"messages": list is expected, not {}'),
    (b'{"messages": []}', "a list of at least one message"),
    (b'{"messages": ["x"]}', "messages[0]: an object is expected, not str"),
    (b'{"messages": [{"role": "user", "content": "x"}]}', "none of the role 'assistant'"),
    (b'{"messages": [], "think": 1}', '"think": bool is expected, not 1'),
    (b'{"messages": [], "tools": "f"}', "\"tools\": list is expected, not 'f'"),
    (b'{"prompt": "\\ud800", "response": "y"}', "half of a surrogate pair"),
    (b'{"prompt": "' + b"1" * 99 + b'", "response": "y"}', "tokens long; at most 72 leave room"),
]


def test_bad_lines_are_told_and_the_others_are_used(small: Tokenizer, tiny: ChatTemplate, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    good = b'{"prompt": "x", "response": "y"}'
    file.write_bytes(b"\n".join([good, b"", b" \r", *(line for line, _ in BAD), good]))
    found, bad = load_jsonl(file, small, tiny, limit=80, canvas=8)
    assert found == examples(Pair("x", "y"), small, tiny, 80, 8) * 2
    assert [line.number for line in bad] == list(range(4, 4 + len(BAD)))
    for line, (_, reason) in zip(bad, BAD, strict=True):
        assert reason in line.reason


def test_a_file_without_examples(small: Tokenizer, tiny: ChatTemplate, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        load_jsonl(tmp_path / "none.jsonl", small, tiny, 80, 8)
    file = tmp_path / "data.jsonl"
    file.write_bytes(b"\n")
    with pytest.raises(ValueError, match=r"data\.jsonl: there is no example in it; it is empty"):
        load_jsonl(file, small, tiny, 80, 8)
    file.write_bytes(b"\n[]\n")
    with pytest.raises(ValueError, match=r"data\.jsonl: .*the first bad line is 2: a JSON object"):
        load_jsonl(file, small, tiny, 80, 8)
