"""The learnt tokenizer: any text comes back, merges keep to words, and equal texts give equal tokenizers."""

import json
import random
import re
import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dgemma.text.small import SPECIAL, bpe_tokenizer, character_tokenizer
from dgemma.text.tokenizer import StreamDecoder, Tokenizer

WORDS = [
    *("the", "cat", "and", "a", "dog", "sat", "on", "their", "mat", "naïve", "12", "345", "6.78", "==", "!=", "((x))"),
    *("foo_bar", "e1", "\n        return", "<|turn>user\n\n", "", "call:", "don't"),
]


def corpus(count: int = 400) -> list[str]:
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=20)) for _ in range(count)]


@pytest.fixture(scope="module")
def learnt() -> Tokenizer:
    return Tokenizer(bpe_tokenizer(corpus(), size=450))


def test_vocabulary(learnt: Tokenizer) -> None:
    characters = Tokenizer(character_tokenizer())
    assert len(learnt) == 450
    assert [learnt.id(token) for token in SPECIAL] == [characters.id(token) for token in SPECIAL]
    assert learnt.special_ids == characters.special_ids
    assert [learnt.token(len(SPECIAL) + i) for i in range(8)] == [f"<unused{i}>" for i in range(8)]
    assert len(learnt.byte_ids) == 256
    for character in [*string.ascii_letters, *string.digits, *string.punctuation, " ", "\n"]:
        assert len(learnt.encode(character)) == 1, character
        assert learnt.id(character.replace(" ", "▁")) is not None
    assert learnt.encode(" the cat") == [learnt.id("▁the"), learnt.id("▁cat")]


def test_merges_keep_to_words_and_to_punctuation(learnt: Tokenizer) -> None:
    merged = [learnt.token(i) for i in range(len(SPECIAL) + 8 + 256 + 96, len(learnt))]
    merged = [token for token in merged if not token.startswith("<unused")]
    assert "▁the" in merged
    assert "((" in merged
    for token in merged:
        assert re.fullmatch(r"▁?[A-Za-z]+|▁+|[!-/:-@\[-`{-~]+", token), token
    assert not {"nave", "ave", "<|", "turn|"} & set(merged)  # neither across what is no ASCII nor of special tokens
    assert len(learnt.encode("1234\n\n\n")) == 7
    assert len(learnt.encode("a1")) == 2


@given(st.text().filter(lambda text: "▁" not in text and "\ufdd0" not in text))
@example("a\tb\r\n  ▂ \x00 é e\u0301 🙂 \u2028 <0x41> <turn|> <unused3> <pad")
def test_any_text_comes_back(learnt: Tokenizer, text: str) -> None:
    ids = learnt.encode(text)
    assert learnt.decode(ids) == text
    assert all(0 <= i < 450 for i in ids)
    assert learnt.unk_id not in learnt.encode(learnt.plain(text))
    decoder = StreamDecoder(learnt)
    assert "".join(decoder.push([i]) for i in ids) + decoder.finish() == text


def test_merges_change_no_text_of_words(learnt: Tokenizer) -> None:
    for text in corpus(50):
        assert learnt.decode(learnt.encode(text)) == text


def test_equal_texts_give_equal_tokenizers(learnt: Tokenizer) -> None:
    texts = corpus()
    random.Random(1).shuffle(texts)
    assert bpe_tokenizer(iter(texts), size=450).to_str() == learnt.backend.to_str()


def test_sizes() -> None:
    small = bpe_tokenizer(["aa"], size=400)
    assert small.get_vocab_size() == 400
    assert len(json.loads(small.to_str())["model"]["merges"]) == 1
    assert Tokenizer(small).decode(Tokenizer(small).encode("aa é")) == "aa é"
    assert bpe_tokenizer([], size=377).get_vocab_size() == 377
    with pytest.raises(ValueError, match="size 376 is too small for 377 tokens"):
        bpe_tokenizer([], size=376)
