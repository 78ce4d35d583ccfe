"""A small tokenizer in the released tokenizer's format, for models that are trained here from nothing."""

import string

from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE

SPECIAL = (
    *("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|turn>", "<turn|>", "<|think|>", "<|channel>", "<channel|>"),
    *("<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>'),
)
MERGES = (("u", "s"), ("us", "e"), ("use", "r"), ("m", "o"), ("mo", "d"), ("mod", "e"), ("mode", "l"))


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
