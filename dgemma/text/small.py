"""A small tokenizer in the released tokenizer's format, for models that are trained here from nothing."""

import json
import re
import string
from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

SPECIAL = (
    *("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|turn>", "<turn|>", "<|think|>", "<|channel>", "<channel|>"),
    *("<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>'),
)
MERGES = (("u", "s"), ("us", "e"), ("use", "r"), ("m", "o"), ("mo", "d"), ("mod", "e"), ("mode", "l"))

RESERVED = 8
"""Tokens of a learnt vocabulary that are kept for later uses, behind the special ones."""
PIECES = r"▁+(?=▁)|▁?\p{L}+|[^\p{L}\p{N}\s▁]+|[\p{N}\s▁]"
"""What merges stay within: a word with the blank before it, an indentation's other blanks, a run of punctuation, any
other character alone."""
_FOREIGN = re.compile("|".join(map(re.escape, SPECIAL)) + r"|[^\n -~]")


def character_tokenizer(size: int = 128) -> Tokenizer:
    """Special tokens, line break, printable ASCII, the role names; filled with unused tokens to `size`."""
    characters = [c for c in string.printable if c.isprintable() and c != " "]
    tokens = [*SPECIAL, "\n", "▁", *characters, *("".join(pair) for pair in MERGES)]
    if len(tokens) > size:
        raise ValueError(f"size {size} is too small for {len(tokens)} tokens")
    tokens += [f"<unused{i}>" for i in range(size - len(tokens))]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=list(MERGES), unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


def bpe_tokenizer(texts: Iterable[str], size: int = 1024) -> Tokenizer:
    """A tokenizer of `size` tokens that spells any text, with merges learnt from `texts`.

    Special tokens as in `character_tokenizer`, then reserved ones, bytes, line break, blank, printable ASCII, and what
    was merged: letters with the blank before them, punctuation, or blanks. Digits and line breaks stay single.
    If the texts hold too few pairs, unused tokens fill the rest. As in the release, "▁" itself is read as a blank.
    """
    characters = ["\n", "▁", *(c for c in string.printable if c.isprintable() and c != " ")]
    tokens = [*SPECIAL, *(f"<unused{i}>" for i in range(RESERVED)), *(f"<0x{b:02X}>" for b in range(256)), *characters]
    if len(tokens) > size:
        raise ValueError(f"size {size} is too small for {len(tokens)} tokens")
    learner = _pieces(Tokenizer(BPE()))
    # Whatever is no character of the vocabulary parts words, or letters would merge across it.
    learner.train_from_iterator(
        (_FOREIGN.sub("\n", text) for text in texts),
        BpeTrainer(vocab_size=size - len(tokens) + len(characters), initial_alphabet=characters, show_progress=False),
    )
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    tokens += dict.fromkeys("".join(pair) for pair in merges)
    tokens += [f"<unused{RESERVED + i}>" for i in range(size - len(tokens))]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = _pieces(Tokenizer(BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


def _pieces(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), "isolated")
    return tokenizer
