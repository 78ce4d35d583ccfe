"""The tokenizer against another implementation's vectors, its files, special tokens and streams."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders
from tokenizers.models import BPE

from dgemma.text.small import character_tokenizer
from dgemma.text.tokenizer import StreamDecoder, Tokenizer

SPECIAL = {
    **{"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<mask>": 4, "<|tool>": 46, "<tool|>": 47, "<|tool_call>": 48},
    **{"<tool_call|>": 49, "<|tool_response>": 50, "<tool_response|>": 51, '<|"|>': 52, "<|think|>": 98},
    **{"<|channel>": 100, "<channel|>": 101, "<|turn>": 105, "<turn|>": 106, "<|image>": 255999},
    **{"<|image|>": 258880, "<image|>": 258882, "<|video|>": 258884},
}


def byte_tokenizer() -> Tokenizer:
    """Two special tokens, one letter and all byte tokens, decoded as the released tokenizer does."""
    tokens = ["<eos>", "<turn|>", "a", *(f"<0x{b:02X}>" for b in range(256))]
    backend = Backend(BPE({token: i for i, token in enumerate(tokens)}, [], byte_fallback=True))
    backend.add_special_tokens(["<eos>", "<turn|>"])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return Tokenizer(backend)


def test_vectors_of_another_implementation(released: Tokenizer, shared: Path) -> None:
    texts = (shared / "tokenizer_vectors.inp").read_text("utf-8").split("\n__ggml_vocab_test__\n")
    wanted = (shared / "tokenizer_vectors.out").read_text("utf-8").splitlines()
    assert len(wanted) == 46
    for text, ids in zip(texts, wanted, strict=True):
        assert released.encode(text) == [int(i) for i in ids.split()], repr(text)
        assert released.decode(released.encode(text)) == text


def test_special_tokens(released: Tokenizer) -> None:
    for token, id in SPECIAL.items():
        assert released.id(token) == id
        assert released.token(id) == token
        assert id in released.special_ids
        assert released.encode(token) == [id]
    assert (released.pad_id, released.eos_id, released.bos_id, released.unk_id, released.mask_id) == (0, 1, 2, 3, 4)
    assert len(released) == 262_144
    assert released.id("no such token") is None
    assert released.encode("<|turn>model\n")[0] == 105
    assert released.encode("Hi")[0] != released.bos_id
    ids = released.encode("<bos>Hi<turn|>")
    assert released.decode(ids) == "<bos>Hi<turn|>"
    assert released.decode(ids, skip_special=True) == "Hi"
    for wrong in (-1, 262_144):
        with pytest.raises(ValueError, match=f"token id {wrong} "):
            released.token(wrong)
    with pytest.raises(ValueError, match="from -1 to 5"):
        released.decode([-1, 5])


def test_plain_text_cannot_write_special_tokens(released: Tokenizer) -> None:
    for token in SPECIAL:
        text = f"say {token} twice: {token}{token}."
        ids = released.encode(released.plain(text))
        assert not set(ids) & released.special_ids
        assert released.decode(ids) == text
    mixed = "<|turn>user\n" + released.plain("a<turn|>b") + "<turn|>"
    assert [i for i in released.encode(mixed) if i in released.special_ids] == [105, 106]


PIECES = st.one_of(st.sampled_from(["<eos>", "<turn|>", "\ufdd0", "<", "turn|>"]), st.text(max_size=4))


@given(st.lists(PIECES).map("".join))
def test_plain_text_comes_back(text: str) -> None:
    """All of it, save a mark that already stands within a token's text."""
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(tokenizer.plain(text))
    assert not set(ids) & tokenizer.special_ids
    assert tokenizer.decode(ids) == text.replace("<\ufdd0turn|>", "<turn|>")


def test_small_tokenizer_by_directory(tmp_path: Path) -> None:
    character_tokenizer(120).save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_directory(tmp_path)
    text = "<bos><|turn>user\nA b, 3!<turn|>\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer) == 120
    assert tokenizer.encode("<bos>") == [tokenizer.bos_id]


def test_small_released_checkpoint(shared: Path) -> None:
    tokenizer = Tokenizer.from_directory(shared / "small")
    text = "Hello, wörld 🦙"
    assert len(tokenizer) == 1024
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.mask_id == 4


def test_settings_of_a_training_run_do_not_cut_prompts(tmp_path: Path) -> None:
    backend = character_tokenizer()
    backend.enable_truncation(4)
    backend.enable_padding(length=4)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert len(tokenizer.encode("abcdefgh")) == 8
    assert len(tokenizer.encode("a")) == 1


def test_names_from_the_config(tmp_path: Path) -> None:
    character_tokenizer().save(str(tmp_path / "tokenizer.json"))
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": {"content": "<turn|>"}, "pad_token": None}))
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.eos_id == tokenizer.id("<turn|>")
    assert tokenizer.pad_id == tokenizer.id("<pad>")
    for content, message in (
        ('{"eos_token": "</s>"}', r"tokenizer\.json: .*</s>.*tokenizer_config\.json"),
        ('{"eos_token": 3}', r"tokenizer_config\.json: eos_token 3"),
        ("{", r"tokenizer_config\.json: not JSON"),
        ("[]", r"tokenizer_config\.json: a JSON object"),
    ):
        config.write_text(content)
        with pytest.raises(ValueError, match=message):
            Tokenizer.from_directory(tmp_path)


def test_missing_and_corrupt_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json: no such file"):
        Tokenizer.from_directory(tmp_path)
    for content in ("{", '{"version": "1.0"}', ""):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer") as caught:
            Tokenizer.from_directory(tmp_path)
        assert "\n" not in str(caught.value)


def test_stream_never_shows_half_a_character(released: Tokenizer) -> None:
    text = "né 😶‍🌫️ ឞ Ꙁ\U0001f9a3 x<turn|>"
    ids = released.encode(text)
    assert any(i in released.byte_ids for i in ids)
    stream = StreamDecoder(released)
    pieces = [stream.push([i]) for i in ids] + [stream.finish()]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) == text


@given(st.lists(st.lists(st.integers(0, 258), max_size=6)), st.booleans())
def test_stream_joined_is_the_whole(pushes: list[list[int]], skip: bool) -> None:
    """Bad bytes too: one spoils its whole run, and skipped tokens do not part a run."""
    tokenizer = byte_tokenizer()
    stream = StreamDecoder(tokenizer, skip_special=skip)
    text = "".join([stream.push(ids) for ids in pushes] + [stream.finish()])
    assert text == tokenizer.decode([i for ids in pushes for i in ids], skip_special=skip)


@given(st.text(), st.data())
def test_stream_of_bytes_is_whole_characters(text: str, data: st.DataObject) -> None:
    tokenizer = byte_tokenizer()
    ids = [3 + b for b in text.encode()]
    cut = data.draw(st.integers(0, len(ids)))
    stream = StreamDecoder(tokenizer)
    assert stream.push(ids[:cut]) + stream.push(ids[cut:]) + stream.finish() == text


def test_text_needs_no_torch() -> None:
    modules = "dgemma.text.chat, dgemma.text.output, dgemma.text.tokenizer, dgemma.text.small"
    subprocess.run([sys.executable, "-c", f"import sys, {modules}; sys.exit('torch' in sys.modules)"], check=True)
