"""A tokenizer of GGUF keys must be the one of the tokenizer.json beside it: same ids, same text."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from dgemma.checkpoints.gguf import read_gguf
from dgemma.text.ggml_tokenizer import backend, names
from dgemma.text.tokenizer import Tokenizer, read_names

TEXTS = (
    "",
    " ",
    "Hello, world",
    "  two   blanks\t\ttabs \n\n\n newlines \r\n ",
    " leading and trailing ",
    "▁ a blank's own sign ▁▁",
    "naïve façade, Ünïcödé, e\u0301 apart; 日本語、한국어, العربية, हिन्दी",
    "🙂 👩‍👩‍👧‍👦 🏳️‍🌈 \U0001f9ff𝔘",
    "\x00\x01\x7f\u200b\u2028\ufeff\ufffd\ufdd0\U0010ffff",
    "<bos>begin<eos><pad><mask> <unk>x<unk>",
    "<bos ><|turn>user\n<0x41><0xE2><turn|>",
    "def f(x: int) -> str:\n    return f'{x:>4}'  # 1.5e-3, 0xFF\n",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" + " " * 40 + "\n" * 35,
)
VISIBLE = ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>')
"""The tokens that the converter calls user-defined."""


def as_keys(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """What the converter writes of a tokenizer.json."""
    special = {token["content"] for token in tokenizer["added_tokens"]}
    vocabulary = tokenizer["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    byte = {f"<0x{b:02X}>" for b in range(256)}
    types = [4 if t in VISIBLE else 3 if t in special else 6 if t in byte else 1 for t in tokens]
    ids = {"bos": "<bos>", "eos": "<eos>", "unknown": "<unk>", "padding": "<pad>", "mask": "<mask>"}
    return {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in tokenizer["model"]["merges"]],
        "tokenizer.ggml.add_space_prefix": False,
        **{f"tokenizer.ggml.{name}_token_id": vocabulary[token] for name, token in ids.items()},
    }


def same(ours: Backend, theirs: Backend, text: str) -> None:
    ids = theirs.encode(text, add_special_tokens=False).ids
    assert ours.encode(text, add_special_tokens=False).ids == ids, repr(text)
    for skip in (False, True):
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip), repr(text)


@pytest.fixture(scope="module")
def small(shared: Path) -> tuple[dict[str, Any], Backend, Backend]:
    """A real file's keys, its tokenizer, and the tokenizer.json beside it."""
    keys = read_gguf(shared / "small" / "model-q4_k_m.gguf").keys
    return keys, backend(keys), Backend.from_file(str(shared / "small" / "tokenizer.json"))


def test_a_real_file(small: tuple[dict[str, Any], Backend, Backend], shared: Path) -> None:
    keys, ours, theirs = small
    assert ours.get_vocab() == theirs.get_vocab()
    assert json.loads(ours.to_str()) == json.loads(theirs.to_str())
    assert names(keys) == read_names(shared / "small")
    for text in TEXTS:
        same(ours, theirs, text)
    tokenizer = Tokenizer(ours, names(keys))
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id, tokenizer.unk_id, tokenizer.mask_id) == (
        0,
        1,
        2,
        3,
        4,
    )


def test_any_text_and_any_ids(small: tuple[dict[str, Any], Backend, Backend]) -> None:
    _, ours, theirs = small
    pieces = st.one_of(st.sampled_from(TEXTS[1:]), st.text(max_size=6))

    @given(st.lists(pieces, max_size=4).map("".join), st.lists(st.integers(0, 1030), max_size=12))
    def check(text: str, ids: list[int]) -> None:
        same(ours, theirs, text)
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids, skip_special_tokens=False)

    check()


def test_the_released_vocabulary(shared: Path, released: Tokenizer) -> None:
    ours = backend(as_keys(json.loads((shared / "tokenizer.json").read_text("utf-8"))))
    assert ours.get_added_tokens_decoder() == released.backend.get_added_tokens_decoder()
    texts = (shared / "tokenizer_vectors.inp").read_text("utf-8").split("\n__ggml_vocab_test__\n")
    wanted = (shared / "tokenizer_vectors.out").read_text("utf-8").splitlines()
    for text, ids in zip(texts, wanted, strict=True):
        assert ours.encode(text, add_special_tokens=False).ids == [int(i) for i in ids.split()], repr(text)
    for text in (*texts, *TEXTS, *VISIBLE):
        same(ours, released.backend, text)


def test_keys_that_do_not_fit_are_named() -> None:
    keys = {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": ["<unk>", "a", "b", "ab"],
        "tokenizer.ggml.token_type": [2, 1, 1, 1],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.unknown_token_id": 0,
    }
    assert backend(keys).encode("ab<unk>b").ids == [3, 0, 2]
    for name, value, message in (
        ("model", "llama", "tokenizer.ggml.model is 'llama'; only 'gemma4'"),
        ("add_space_prefix", True, "add_space_prefix true"),
        ("tokens", ["<unk>", "a", "a", "ab"], "4 tokens, 3 of them different, have 4 types"),
        ("token_type", [2, 1, 1], "4 tokens, 4 of them different, have 3 types"),
        ("merges", ["a c"], "merges do not fit the tokens"),
        ("merges", ["ab"], "merges do not fit the tokens"),
        ("unknown_token_id", 9, "unknown_token_id 9 is not one of 4 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            backend(keys | {f"tokenizer.ggml.{name}": value})
    with pytest.raises(ValueError, match=r"lacks tokenizer\.ggml\.merges"):
        backend({name: value for name, value in keys.items() if not name.endswith("merges")})
