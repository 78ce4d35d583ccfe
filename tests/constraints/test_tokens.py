"""From bytes to tokens: every state, every token, against the bytes gone through one by one."""

import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders
from tokenizers.models import BPE

from dgemma import embedded
from dgemma.constraints import automaton, compile, regex, tokens
from dgemma.constraints.grammar import grammar
from dgemma.constraints.nodes import Special, sequence
from dgemma.constraints.schema import json_schema
from dgemma.constraints.tools import tool_calls
from dgemma.text.tokenizer import Tokenizer

ENDS, PAD = (1, 106), 0
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "string"}}}}}
NODES = {
    "expression": regex.fullmatch(r"([a-z]+|ä€😀)(, ?[A-Z]{2,4})*"),
    "schema": json_schema({"properties": {"a": {"type": "string", "maxLength": 5}, "b": {"type": "integer"}}}),
    "object": json_schema({"type": "object"}),
    "call": tool_calls([TOOL]),
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(embedded.HERE / "tiny")


@pytest.mark.parametrize("name", NODES)
def test_every_token_of_every_state(tokenizer: Tokenizer, name: str) -> None:
    bytewise, size = automaton.build(NODES[name]), len(tokenizer) + 5
    ends = tuple(i for i in ENDS if i < size)
    lifted = tokens.lift(bytewise, tokenizer, size, ends, PAD)
    spelled, whole = tokenizer.spellings(), len(bytewise.transitions)
    rng = random.Random(0)
    for state in rng.sample(range(whole), min(whole, 40)):
        for token in range(size):
            expected = state if token in spelled else -1
            for byte in spelled.get(token, b""):
                expected = int(bytewise.transitions[expected, byte]) if expected >= 0 else -1
            for column, mark in enumerate(bytewise.specials, 256):
                if token == tokenizer.id(mark):
                    expected = int(bytewise.transitions[state, column])
            if token in ends and bytewise.accepting[state]:
                expected = whole
            assert lifted.after([token], state) == expected, (state, token)
    assert lifted.done.tolist() == [*bytewise.accepting.tolist(), True]
    assert {i for i in range(size) if lifted.after([i], whole) >= 0} == {*ends, PAD}
    assert all(lifted.after([i], whole) == whole for i in (*ends, PAD))
    # No two classes are the same.
    assert len({column.tobytes() for column in lifted.table.T}) == lifted.table.shape[1]


def test_spellings_are_what_decoding_gives(tokenizer: Tokenizer) -> None:
    spelled, rng = tokenizer.spellings(), random.Random(1)
    ordinary = [i for i in spelled if i not in tokenizer.byte_ids]
    for _ in range(200):
        ids = rng.choices(ordinary, k=8)
        assert tokenizer.decode(ids).encode() == b"".join(spelled[i] for i in ids)
    assert not spelled.keys() & tokenizer.special_ids
    assert {spelled[i] for i in tokenizer.byte_ids} == {bytes([b]) for b in range(256)}


def test_the_released_vocabulary(shared: Path) -> None:
    released = Tokenizer.from_directory(shared)
    schema = {"properties": {"name": {"type": "string"}, "n": {"type": "integer"}}, "required": ["name"]}
    made = compile.compiled(schema, released, 262144, (1, 106, 50), 0)
    for text, right in (('{"name": "Łódź 😀", "n": 7}', True), ('{"n": 7}', False), ('{"name":"a"} ', False)):
        ids = released.encode(text)
        state = made.after(ids)
        assert (state >= 0 and bool(made.done[state])) is right
        assert (made.after([*ids, 106, 0, 1]) >= 0) is right
    assert made is compile.compiled(dict(schema), released, 262144, (1, 106, 50), 0)
    thought = released.encode("<|channel>thought\n<channel|>") + released.encode('{"name":""}')
    assert made.after(thought) >= 0
    words = released.encode("<|channel>thought\nWell.<channel|>") + released.encode('{"name":""}')
    assert made.after(words) < 0
    assert compile.compiled(schema, released, 262144, (1, 106, 50), 0, think=True).after(words) >= 0


def test_what_a_tokenizer_cannot_give(tokenizer: Tokenizer) -> None:
    lost = automaton.build(sequence(Special("<|nothing|>"), "a"))
    with pytest.raises(ValueError, match=r"needs the token <\|nothing\|>"):
        tokens.lift(lost, tokenizer, len(tokenizer), (1,), 0)
    backend = Backend(BPE({"a": 0}, []))
    backend.decoder = decoders.ByteLevel()
    with pytest.raises(ValueError, match="writes ▁ for a blank"):
        Tokenizer(backend).spellings()


def test_a_table_too_large_is_refused(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "LIMIT", 5000)
    with pytest.raises(ValueError, match="too large for this tokenizer"):
        tokens.lift(automaton.build(json_schema({"type": "object"})), tokenizer, len(tokenizer), (1,), 0)


@pytest.mark.parametrize("constraint", [[], [1], ["a", ""], None, 3, True])
def test_what_is_no_constraint(constraint: object) -> None:
    with pytest.raises(ValueError, match="a constraint is a JSON schema, a regular expression"):
        compile.node_of(constraint)  # type: ignore[arg-type]


def test_random_expressions_hold_for_any_spelling(tokenizer: Tokenizer) -> None:
    """A text that matches is accepted however it is cut into tokens."""
    made = compile.compiled("[a-z ]{3,30}|[0-9]+", tokenizer, len(tokenizer), (1,), 0)
    spelled = {text: i for i, text in tokenizer.spellings().items()}
    rng = np.random.default_rng(0)
    for text in ("the cat sat on the mat", "1234567", "a b c", "ab", "a1b"):
        data, ids, at = text.encode(), [], 0
        while at < len(data):
            pieces = [data[at : at + n] for n in range(1, 9) if data[at : at + n] in spelled and at + n <= len(data)]
            piece = pieces[rng.integers(len(pieces))]
            ids.append(spelled[piece])
            at += len(piece)
        state = made.after(ids)
        assert (state >= 0 and bool(made.done[state])) is (text not in ("ab", "a1b"))


def test_what_was_asked_for_before_is_known(tokenizer: Tokenizer) -> None:
    made = lambda constraint: compile.compiled(constraint, tokenizer, 1024, (1,), 0)  # noqa: E731
    nested = 'start: e\ne: t ("+" t)*\nt: f ("*" f)*\nf: /[0-9]/ | "(" e ")" | "-" f | e "!"'
    for ask in (
        lambda: {"type": "object", "properties": {"a": {"type": "integer"}}},
        lambda: ["yes", "no"],
        lambda: "[a-c]+",
        lambda: tool_calls([dict(TOOL)]),
        lambda: grammar(nested),  # a graph with more paths than can be gone through
    ):
        assert made(ask()) is made(ask())
    assert made(["a"]) is not made("a")
    for wrong in ({"const": {1, 2}}, [object()]):
        with pytest.raises(ValueError, match="not JSON"):
            made(wrong)
