"""Full pages of keys and values by content: a prompt that begins as an earlier one did does not encode that part again.

A page's key is a hash of its tokens and of the key before it, so equal keys mean equal prefixes. Pages are shared by
reference and never written; the cache forgets the ones that were least recently used.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from torch import Tensor

from dgemma.config import SLIDING, ModelConfig
from dgemma.model.cache import Row


@dataclass(frozen=True)
class _Page:
    tensors: dict[str, Tensor]
    nbytes: int


class PrefixCache:
    """At most `limit` bytes of pages; 0 keeps none. `salt` parts those that must not share, such as tenants."""

    def __init__(self, config: ModelConfig, limit: int):
        self.config, self.limit, self.page = config, limit, config.canvas_length
        self.nbytes = 0
        self._pages: OrderedDict[bytes, _Page] = OrderedDict()

    def __len__(self) -> int:
        return len(self._pages)

    def keys(self, tokens: Sequence[int], salt: str = "") -> list[bytes]:
        """The key of each full page of a sequence."""
        key, found = salt.encode(), []
        ids = np.asarray(tokens, dtype=np.int32)
        for end in range(self.page, len(ids) + 1, self.page):
            key = blake2b(key + ids[end - self.page : end].tobytes(), digest_size=16).digest()
            found.append(key)
        return found

    def find(self, tokens: Sequence[int], salt: str = "") -> Row:
        """A row that holds as many of the sequence's first pages as are known, but never all of its tokens."""
        known: list[_Page] = []
        keys = self.keys(tokens[:-1], salt)
        for key in keys:
            page = self._pages.get(key)
            if page is None:
                break
            known.append(page)
        self._touch(keys[: len(known)])
        row = Row(len(known) * self.page)
        reached = self.config.first_reached(SLIDING, row.length) // self.page
        for kind, pages in row.pages.items():
            from_here = reached if kind == SLIDING else 0
            pages += [page.tensors.get(kind) if i >= from_here else None for i, page in enumerate(known)]
        return row

    def add(self, tokens: Sequence[int], row: Row, salt: str = "") -> None:
        """Takes the full pages of a row whose tokens these are; what a sliding layer has let go of is not complete."""
        if not self.limit:
            return
        keys = self.keys(tokens[: row.length], salt)
        for number, key in enumerate(keys):
            if key in self._pages:
                continue
            tensors = {kind: pages[number] for kind, pages in row.pages.items() if number < len(pages)}
            held = {kind: tensor for kind, tensor in tensors.items() if tensor is not None}
            if len(held) == len(tensors):
                page = _Page(held, sum(tensor.nbytes for tensor in held.values()))
                self._pages[key] = page
                self.nbytes += page.nbytes
        self._touch(keys)
        while self.nbytes > self.limit:
            _, page = self._pages.popitem(last=False)
            self.nbytes -= page.nbytes

    def _touch(self, keys: Sequence[bytes]) -> None:
        """Marks pages as used; the last of a prefix is forgotten first, since without the first no other is found."""
        for key in reversed(keys):
            if key in self._pages:
                self._pages.move_to_end(key)
