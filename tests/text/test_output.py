"""Output of the model: thoughts, answer and calls, malformed ones too, in any pieces."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgemma import embedded
from dgemma.text.calls import DEPTH, ToolCall, format_pairs, parse_call
from dgemma.text.chat import ChatTemplate
from dgemma.text.output import (
    MARKS,
    ContentDelta,
    OutputParser,
    ParsedOutput,
    ReasoningDelta,
    parse,
    parse_tokens,
)
from dgemma.text.tokenizer import Tokenizer

EMPTY = "<|channel>thought\n<channel|>"
OSLO = '<|tool_call>call:get_weather{city:<|"|>Oslo<|"|>,days:2,flag:true}<tool_call|>'
OSLO_CALL = ToolCall("get_weather", {"city": "Oslo", "days": 2, "flag": True})


def output(content: str = "", reasoning: str = "", calls: tuple[ToolCall, ...] = (), **fields: Any) -> ParsedOutput:
    return ParsedOutput(reasoning, content, list(calls), fields.get("complete", True), fields.get("problems", []))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Hello", output("Hello")),
        ("", output()),
        ("Hello<turn|>", output("Hello")),
        ("Hello<eos>", output("Hello")),
        (EMPTY + "Hello<turn|>", output("Hello")),
        ("<|channel>thought<channel|>Hello", output("Hello")),
        ("<|channel><channel|>Hello", output("Hello")),
        ("<|channel>thought\nhm,\n\nso\n<channel|>Hello\n", output("Hello\n", "hm,\n\nso")),
        ("<|channel>thought\nhm<channel|>Hello", output("Hello", "hm")),
        ("<|channel>thoughtful<channel|>Hello", output("Hello", "thoughtful")),
        ("<|channel>thought\nhm", output("", "hm", complete=False)),
        ("<|channel>thought\nhm<turn|>", output("", "hm", complete=False)),
        ("<|channel>thought\n", output(complete=False)),
        ("<|channel>thou", output(complete=False)),
        ("<|channel>", output(complete=False)),
        ("Well <|channel>thought\nhm<channel|>yes", output("Well yes", "hm")),
        ("<|channel>thought\n<|channel>thought\nhm<channel|>yes", output("yes", "hm")),
        ("<|channel>thought\na<channel|>b<|channel>thought\nc<channel|>d", output("bd", "a\n\nc")),
        ("<channel|>Hello<tool_call|>", output("Hello")),
        ("a < b <| c <|channel", output("a < b <| c <|channel")),
        ('say <|"|>', output('say <|"|>')),
        (OSLO + "<|tool_response>", output(calls=(OSLO_CALL,))),
        (EMPTY + "Let me see." + OSLO, output("Let me see.", calls=(OSLO_CALL,))),
        ("<|channel>thought\nhm<channel|>" + OSLO * 2, output("", "hm", calls=(OSLO_CALL,) * 2)),
        (f"<|channel>thought\nor {OSLO}<channel|>no", output("no", f"or {OSLO}")),
        (f"<|channel>thought\n{OSLO}<|tool_response>", output("", OSLO, complete=False)),
    ],
)
def test_forms(text: str, wanted: ParsedOutput) -> None:
    assert parse(text) == wanted


@pytest.mark.parametrize(
    ("body", "arguments"),
    [
        ("call:f{}", {}),
        ("call:f{a:{},b:[],c:[[]]}", {"a": {}, "b": [], "c": [[]]}),
        ('call:f{a:{b:{c:[1,{d:<|"|>x<|"|>}]}},e:2}', {"a": {"b": {"c": [1, {"d": "x"}]}}, "e": 2}),
        ('call:f{a:<|"|>}{],[:"\\ <tool_call|><turn|> <b><|"|>}', {"a": '}{],[:"\\ <tool_call|><turn|> <b>'}),
        ('call:f{a:<|"|>5<|"|>,b:5,c:<|"|>true<|"|>,d:<|"|><|"|>}', {"a": "5", "b": 5, "c": "true", "d": ""}),
        ("call:f{a:true,b:false,c:null,d:None}", {"a": True, "b": False, "c": None, "d": None}),
        ("call:f{a:-1,b:0,c:-0.5}", {"a": -1, "b": 0, "c": -0.5}),
        ("call:f{d:1e3,e:2.5E-7,f:1e+20}", {"d": 1000.0, "e": 2.5e-7, "f": 1e20}),
        ('call:f{<|"|>a:b, {c}<|"|>:1}', {"a:b, {c}": 1}),
        (' call:f { a : 1 , first name :\n[ 1 , 2 ] } ', {"a": 1, "first name": [1, 2]}),
        ("call:f{7:123456789012345678901234567890}", {"7": 123456789012345678901234567890}),
    ],
)  # fmt: skip
def test_arguments(body: str, arguments: dict[str, Any]) -> None:
    parsed = parse(f"<|tool_call>{body}<tool_call|>")
    assert parsed == output(calls=(ToolCall("f", arguments),))
    values = parsed.tool_calls[0].arguments
    assert repr(values) == repr(arguments)  # 1 is not True, nor 1.0
    assert json.loads(parsed.tool_calls[0].arguments_json) == arguments


@pytest.mark.parametrize("name", ["get_weather", "a.b-c/d:e", "F1", "søk"])
def test_names(name: str) -> None:
    assert parse_call(f"call:{name}{{}}").name == name


MALFORMED = [
    ("", "the name of a function"),
    ("call:{a:1}", "the name of a function"),
    ("get_weather{a:1}", "the name of a function"),
    ("call:f", "'{' is expected at character 6, not the end"),
    ("call:f g{}", "'{' is expected"),
    ("call:f{", "a key is expected at character 7, not the end"),
    ("call:f{a", "':' is expected"),
    ("call:f{a}", "':' is expected at character 8, not '}'"),
    ("call:f{a:}", "a value is expected"),
    ("call:f{a:1", "',' or '}' is expected"),
    ("call:f{a:1,}", "a key is expected"),
    ("call:f{:1}", "a key is expected"),
    ("call:f{a:[1,]}", "a value is expected"),
    ("call:f{a:[1}", "',' or ']' is expected"),
    ("call:f{a:Oslo}", "a value is expected at character 9, not 'Oslo}'"),
    ("call:f{a:truely}", "a value is expected"),
    ("call:f{a:007}", "a value is expected"),
    ("call:f{a:1.2.3}", "a value is expected"),
    ("call:f{a:2nd}", "a value is expected"),
    ("call:f{a:NaN}", "a value is expected"),
    ("call:f{a:1e999}", "out of range"),
    ("call:f{a:" + "9" * 5000 + "}", "limit"),
    ("call:f{a:1,a:2}", "the key 'a' stands twice"),
    ("call:f{a:1}}", "the end of the call is expected at character 11, not '}'"),
    ("call:f{a:1} and more", "the end of the call"),
    ("call:f{a:" + "[" * 5000, "nested deeper"),
    ("call:f{a:" * 2000, "a value is expected"),
    ("call:f" + "{a:" * 5000, "nested deeper"),
    ("%$ junk", "the name of a function"),
]


@pytest.mark.parametrize(("body", "problem"), MALFORMED)
def test_a_malformed_call_is_content_verbatim(body: str, problem: str) -> None:
    text = f"<|tool_call>{body}<tool_call|>"
    parsed = parse(f"one {text} two{OSLO}")
    assert parsed == output(f"one {text} two", calls=(OSLO_CALL,), problems=parsed.problems)
    assert len(parsed.problems) == 1
    assert problem in parsed.problems[0]


def test_depth() -> None:
    deep = "[" * (DEPTH - 1) + "]" * (DEPTH - 1)
    assert parse_call(f"call:f{{a:{deep}}}").arguments["a"] == json.loads(deep)
    with pytest.raises(ValueError, match=f"deeper than {DEPTH}"):
        parse_call(f"call:f{{a:[[{deep}]]}}")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        # No closer: to the end, to the end of the turn, to the next opener, to a thought.
        ("<|tool_call>call:f{a:1}", output("<|tool_call>call:f{a:1}", complete=False)),
        ("<|tool_call>call:f{a:1}<|tool_response>", output("<|tool_call>call:f{a:1}")),
        (f"<|tool_call>call:f{{a:{OSLO}", output("<|tool_call>call:f{a:", calls=(OSLO_CALL,))),
        ("<|tool_call>call:f{<|channel>thought\nhm<channel|>x", output("<|tool_call>call:f{x", "hm")),
        ("<|tool_call>", output("<|tool_call>", complete=False)),
        # A string with no end does not swallow what follows.
        (
            f'<|tool_call>call:f{{a:<|"|>Bergen}}<tool_call|>and{OSLO}<turn|>',
            output('<|tool_call>call:f{a:<|"|>Bergen}<tool_call|>and', calls=(OSLO_CALL,)),
        ),
        ('<|tool_call>call:f{a:<|"|>Ber<turn|>', output('<|tool_call>call:f{a:<|"|>Ber')),
        ('<|tool_call>call:f{a:<|"|>Ber', output('<|tool_call>call:f{a:<|"|>Ber', complete=False)),
        ('<|tool_call>call:f{a:<|"|>Ber<|chan', output('<|tool_call>call:f{a:<|"|>Ber<|chan', complete=False)),
    ],
)
def test_a_call_without_end(text: str, wanted: ParsedOutput) -> None:
    parsed = parse(text)
    assert len(parsed.problems) == 1
    assert parsed == ParsedOutput(wanted.reasoning, wanted.content, wanted.tool_calls, wanted.complete, parsed.problems)


def test_increments_come_as_soon_as_they_are_certain() -> None:
    parser = OutputParser()
    assert parser.push("<|channel>tho") == []
    assert parser.push("ught\nhm\n") == [ReasoningDelta("hm")]
    assert parser.push("so\n<chan") == [ReasoningDelta("\nso")]
    assert parser.push("nel|>Yes <") == [ContentDelta("Yes ")]
    assert parser.push("b") == [ContentDelta("<b")]
    assert parser.push(OSLO[:-1]) == []
    assert parser.push(">.<|tool_call>x<tool_call|>.") == [
        OSLO_CALL,
        ContentDelta("."),
        ContentDelta("<|tool_call>x<tool_call|>", "'call:' and the name of a function are expected"),
        ContentDelta("."),
    ]
    assert parser.push("<") == []
    assert parser.finish() == [ContentDelta("<")]
    assert parser.complete


def joined(increments: list[Any]) -> list[Any]:
    """Neighbours of one kind made one; calls and verbatim calls stay as they are."""
    out: list[Any] = []
    for item in increments:
        last = out[-1] if out else None
        plain = not isinstance(item, ToolCall) and getattr(item, "problem", None) is None
        if plain and type(last) is type(item) and getattr(last, "problem", None) is None:
            out[-1] = type(item)(last.text + item.text)
        else:
            out.append(item)
    return out


PIECE = st.one_of(
    st.sampled_from(MARKS),
    st.sampled_from(["thought", "thought\n", "\n", "call:f{", "a:1", "x:", "}", "[", ",", "<|", "tool_call>", "x"]),
    st.sampled_from([OSLO, EMPTY]),
    st.text("<|>a\n", max_size=3),
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.lists(PIECE, max_size=20), st.data())
def test_no_cut_matters(pieces: list[str], data: st.DataObject) -> None:
    text = "".join(pieces)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    whole, cut, single = OutputParser(), OutputParser(), OutputParser()
    wanted = joined(whole.push(text) + whole.finish())
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert joined([i for part in parts for i in cut.push(part)] + cut.finish()) == wanted
    assert joined([i for character in text for i in single.push(character)] + single.finish()) == wanted
    assert whole.complete == cut.complete == single.complete
    # Nothing is lost: what is no marker stands in the thoughts, in the answer or in a call.
    shown = [f"{i.name}{i.arguments_json}" if isinstance(i, ToolCall) else i.text for i in wanted]
    assert "".join(shown).count("x") == text.count("x")


KEYS = st.text("abz_ Zé09-$", min_size=1, max_size=6).map(str.strip).filter(bool)
STRINGS = st.one_of(
    st.text(max_size=8), st.lists(st.sampled_from([*MARKS, "}", ",", "]", ":", '"', "\n"])).map("".join)
)
VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False),
        STRINGS.filter(lambda s: '<|"|>' not in s),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=10,
)  # fmt: skip
ARGUMENTS = st.dictionaries(KEYS, VALUES, max_size=4)


@settings(deadline=None)
@given(ARGUMENTS)
def test_arguments_come_back(arguments: dict[str, Any]) -> None:
    parsed = parse(f"<|tool_call>call:f{{{format_pairs(arguments)}}}<tool_call|>")
    assert parsed == output(calls=(ToolCall("f", arguments),))
    assert json.loads(parsed.tool_calls[0].arguments_json) == arguments


@settings(max_examples=50, deadline=None)
@given(ARGUMENTS)
def test_what_the_template_renders_comes_back(template: ChatTemplate, arguments: dict[str, Any]) -> None:
    calls = [{"function": {"name": name, "arguments": json.dumps(arguments)}} for name in ("f", "g")]
    asked = [{"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": calls}]
    written = template.render(asked).split("<|turn>model\n", 1)[1]
    assert parse(written).tool_calls == [ToolCall("f", arguments), ToolCall("g", arguments)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(embedded.HERE / "tiny")


@pytest.mark.parametrize(
    "text", [EMPTY + "Hello<turn|>", "<|channel>thought\nhm 🦋\n<channel|>a" + OSLO * 2, "<|channel>thou"]
)
def test_tokens_are_parsed_as_their_text_is(tokenizer: Tokenizer, text: str) -> None:
    assert parse_tokens(tokenizer.encode(text), tokenizer) == parse(text)


@pytest.mark.parametrize("mark", MARKS)
def test_ordinary_tokens_that_spell_a_marker_out_are_text(tokenizer: Tokenizer, mark: str) -> None:
    said = tokenizer.encode(tokenizer.plain(f"a {mark} b"))
    assert tokenizer.id(mark) not in said
    assert parse_tokens(said, tokenizer) == output(f"a {mark} b")
    thought, end, turn = (tokenizer.encode(each) for each in ("<|channel>thought\n", "<channel|>", "<turn|>"))
    assert parse_tokens([*thought, *said, *end, *said, *turn], tokenizer) == output(f"a {mark} b", f"a {mark} b")
