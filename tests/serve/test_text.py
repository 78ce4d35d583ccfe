"""A choice's text: wherever its tokens are cut into blocks, it comes out the same."""

import random

import pytest

from dgemma import embedded
from dgemma.serve.text import ChoiceText
from dgemma.text.output import ContentDelta, ReasoningDelta, ToolCall, parse
from dgemma.text.tokenizer import Tokenizer

SAID = (
    "<|channel>thought\nHm, END? No.\n<channel|>Crème 🦋: 3 < 4"
    '<|tool_call>call:f{a:<|"|>END<|"|>}<tool_call|><|tool_call>call:bad<tool_call|> so EN or END it is<turn|>'
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(embedded.HERE / "tiny")


@pytest.mark.parametrize("stops", [[], ["END"], ["4 so", " or E"]])
@pytest.mark.parametrize("calls", [True, False])
def test_cuts_change_nothing(tokenizer: Tokenizer, stops: list[str], calls: bool) -> None:
    tokens, parsed = tokenizer.encode(SAID), parse(SAID)
    wanted = parsed.content
    if not calls:
        wanted = wanted.replace(
            "<|tool_call>call:bad", '<|tool_call>call:f{a:<|"|>END<|"|>}<tool_call|><|tool_call>call:bad'
        )
    ends = [at for stop in stops if (at := wanted.find(stop)) >= 0]
    wanted = wanted[: min(ends, default=None)]
    for seed in range(30):
        rng = random.Random(seed)
        text = ChoiceText(tokenizer, stops, [tokenizer.encode("<turn|>")[0]], chat=True, calls=calls)
        at, given = 0, []
        while at < len(tokens):
            size = rng.choice((1, 2, 7, 90))
            given += text.push(tokens[at : at + size])
            at += size
        given += text.finish()
        assert text.content == "".join(i.text for i in given if isinstance(i, ContentDelta)) == wanted
        assert text.reasoning == "".join(i.text for i in given if isinstance(i, ReasoningDelta)) == parsed.reasoning
        assert text.tool_calls == [i for i in given if isinstance(i, ToolCall)]
        assert text.stopped == bool(ends)
        assert text.tokens == tokens[: len(text.tokens)]
        assert text.raw == SAID.removesuffix("<turn|>") or text.stopped
        assert text.whole.endswith(wanted[-8:])


def test_plain_text_has_no_special_tokens_and_keeps_the_rest(tokenizer: Tokenizer) -> None:
    text = ChoiceText(tokenizer, ["zz"], [], chat=False, calls=False)
    tokens = tokenizer.encode("One z<turn|>two z")
    increments = text.push(tokens) + text.finish()
    assert text.content == "".join(i.text for i in increments if isinstance(i, ContentDelta)) == "One ztwo z"
    assert (text.tokens, text.reasoning_tokens) == (tokens, 0)
