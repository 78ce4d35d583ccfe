"""The tokenizer that a GGUF file holds in its `tokenizer.ggml.*` keys: tokenizer.json in another form."""

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

MODEL = "gemma4"
_PREFIX = "tokenizer.ggml."
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_NAMES = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown", "mask": "mask"}


def backend(keys: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a file's keys. ValueError for another model than "gemma4" and for keys that do not fit."""
    model = keys.get(f"{_PREFIX}model")
    if model != MODEL:
        raise ValueError(f"{_PREFIX}model is {model!r}; only {MODEL!r} is known")
    missing = [key for name in ("tokens", "token_type", "merges") if (key := _PREFIX + name) not in keys]
    if missing:
        raise ValueError(f"the tokenizer lacks {', '.join(missing)}")
    if keys.get(f"{_PREFIX}add_space_prefix"):
        raise ValueError(f"{_PREFIX}add_space_prefix true is not supported; the family adds no blank")
    tokens, types = keys[f"{_PREFIX}tokens"], keys[f"{_PREFIX}token_type"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if not len(vocabulary) == len(tokens) == len(types):
        raise ValueError(f"{len(tokens)} tokens, {len(vocabulary)} of them different, have {len(types)} types")
    merges = [tuple(merge.split(" ")) for merge in keys[f"{_PREFIX}merges"]]
    try:
        bpe = BPE(vocabulary, merges, unk_token=names(keys).get("unk"), fuse_unk=True, byte_fallback=True)
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{_PREFIX}merges do not fit the tokens: {error}") from error
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    # The converter calls those user-defined that its chat parser must see; in tokenizer.json all are special.
    special = {_UNKNOWN, _CONTROL, _USER_DEFINED}
    added = (token for token, type in zip(tokens, types, strict=True) if type in special)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in added])
    return tokenizer


def names(keys: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that the keys name by id: {"bos": "<bos>", …}. ValueError for an id without a token."""
    tokens = keys[f"{_PREFIX}tokens"]
    ids = {name: keys[key] for name, of in _NAMES.items() if (key := f"{_PREFIX}{of}_token_id") in keys}
    for name, i in ids.items():
        if not 0 <= i < len(tokens):
            raise ValueError(f"{_PREFIX}{_NAMES[name]}_token_id {i} is not one of {len(tokens)} tokens")
    return {name: tokens[i] for name, i in ids.items()}
