"""Text to token ids and back, over the checkpoint's own tokenizer.json."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from tokenizers import Tokenizer as Backend

NAMES = ("bos", "eos", "pad", "unk", "mask")
BREAK = "\ufdd0"  # a noncharacter: no text for interchange holds it


class Tokenizer:
    """A tokenizer with its special tokens by name.

    `names` maps "bos", "eos", "pad", "unk", "mask" to tokens ("<bos>" …); what it lacks is looked up as `<name>`.
    """

    def __init__(self, backend: Backend, names: Mapping[str, str] | None = None):
        self.backend = backend
        # A file may carry the settings of somebody's training run; a prompt is never cut or filled here.
        backend.no_truncation()
        backend.no_padding()
        lost = [token for token in (names or {}).values() if self.id(token) is None]
        if lost:
            raise ValueError(f"the tokenizer has no token {', '.join(lost)}")
        known = {name: f"<{name}>" for name in NAMES} | dict(names or {})
        self.names = {name: token for name, token in known.items() if self.id(token) is not None}
        self.added = {token.content: i for i, token in backend.get_added_tokens_decoder().items()}
        self.special_ids = frozenset(i for i, t in backend.get_added_tokens_decoder().items() if t.special)
        self.byte_ids = frozenset(i for b in range(256) if (i := self.id(f"<0x{b:02X}>")) is not None)
        ordered = sorted((token for token in self.added if len(token) > 1), key=len, reverse=True)
        self._added = re.compile("|".join(map(re.escape, ordered)) or r"(?!)")
        broken = (f"(?<={re.escape(token[0])}){BREAK}(?={re.escape(token[1:])})" for token in ordered)
        self._broken = re.compile("|".join(broken) or r"(?!)")

    @classmethod
    def from_directory(cls, path: str | Path) -> Self:
        """Read tokenizer.json and, for the names of the special tokens, tokenizer_config.json if there is one."""
        file = Path(path) / "tokenizer.json"
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file; a checkpoint needs its tokenizer.json")
        try:
            backend = Backend.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{file}: not a tokenizer: {error}") from error
        try:
            return cls(backend, read_names(path))
        except ValueError as error:
            raise ValueError(f"{file}: {error}, which tokenizer_config.json names") from error

    def __len__(self) -> int:
        """Tokens in the vocabulary, added ones included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def bos_id(self) -> int | None:
        return self._named("bos")

    @property
    def eos_id(self) -> int | None:
        return self._named("eos")

    @property
    def pad_id(self) -> int | None:
        return self._named("pad")

    @property
    def unk_id(self) -> int | None:
        return self._named("unk")

    @property
    def mask_id(self) -> int | None:
        return self._named("mask")

    def _named(self, name: str) -> int | None:
        return self.id(self.names[name]) if name in self.names else None

    def id(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    def token(self, id: int) -> str:
        """The token as the vocabulary spells it ("▁Hello", "<0xE2>"). Raises ValueError if there is none."""
        token = self.backend.id_to_token(id) if id >= 0 else None
        if token is None:
            raise ValueError(f"token id {id} is not in the vocabulary of {len(self)} tokens")
        return token

    def encode(self, text: str) -> list[int]:
        """Ids of `text`. Special tokens in it are recognised (save those marked by `plain`); no BOS is added."""
        pieces = self._broken.split(text) if BREAK in text else [text]
        return [i for piece in pieces for i in self.backend.encode(piece, add_special_tokens=False).ids]

    def spellings(self) -> dict[int, bytes]:
        """The bytes of each token that is text; special tokens are none.

        ValueError for a tokenizer whose tokens are spelled otherwise than with ▁ for a blank and <0xE2> for a byte.
        """
        decoder = json.loads(self.backend.to_str()).get("decoder") or {}
        parts = decoder.get("decoders", [decoder])
        blank = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
        if not parts or any(part != blank and part.get("type") not in ("ByteFallback", "Fuse") for part in parts):
            raise ValueError("constraints need a tokenizer that writes ▁ for a blank and <0xE2> for a byte")
        found = {}
        for token, i in self.backend.get_vocab(with_added_tokens=True).items():
            if i in self.byte_ids:
                found[i] = bytes([int(token[3:5], 16)])
            elif i not in self.special_ids and token:
                found[i] = (token if token in self.added else token.replace("▁", " ")).encode()
        return found

    def plain(self, text: str) -> str:
        """Mark `text` so that `encode` reads its special tokens as ordinary characters.

        A user or a web page that writes "<turn|>" must not end a turn. The mark is a noncharacter within the token;
        it goes through a template unharmed and `encode` takes it out again.
        """
        return self._added.sub(lambda match: match[0][0] + BREAK + match[0][1:], text)

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Text of `ids`; an id that has no token gives none. Bytes that are no UTF-8 become U+FFFD."""
        try:
            return self.backend.decode(list(ids), skip_special_tokens=skip_special)
        except OverflowError as error:
            raise ValueError(
                f"ids from {min(ids)} to {max(ids)}: a token id is not negative and fits 32 bits"
            ) from error


class StreamDecoder:
    """Decode ids as they come. What `push` and `finish` return, joined, equals `decode` of all ids.

    A character may be spelled as several byte tokens, and one bad byte spoils its whole run; so a run of bytes is held
    until another token ends it.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = False):
        self.tokenizer = tokenizer
        self.skipped = tokenizer.special_ids if skip_special else frozenset()
        self._held: list[int] = []

    def push(self, ids: Iterable[int]) -> str:
        held = self._held + [i for i in ids if i not in self.skipped]
        cut = len(held)
        while cut and held[cut - 1] in self.tokenizer.byte_ids:
            cut -= 1
        self._held = held[cut:]
        return self.tokenizer.decode(held[:cut])

    def finish(self) -> str:
        held, self._held = self._held, []
        return self.tokenizer.decode(held)


def read_config(path: str | Path) -> dict[str, Any]:
    """tokenizer_config.json of a checkpoint's directory; empty if there is none."""
    file = Path(path) / "tokenizer_config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file}: a JSON object is expected, not {type(config).__name__}")
    return config


def read_names(path: str | Path) -> dict[str, str]:
    """The special tokens that tokenizer_config.json names: {"bos": "<bos>", …}; those it does not name are absent."""
    names = {}
    config = read_config(path)
    for name in NAMES:
        token = config.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token  # older files write an object
        if token is not None and not isinstance(token, str):
            raise ValueError(f"{Path(path) / 'tokenizer_config.json'}: {name}_token {token!r} is not a token's text")
        if token is not None:
            names[name] = token
    return names
