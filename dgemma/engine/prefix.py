"""Full pages of keys and values by content: a prompt that begins as an earlier one did does not encode that part again.

A page's key is a hash of its tokens, of the pictures that some of them stand for, and of the key before it, so equal
keys mean equal prefixes. Pages are shared by reference and never written; the cache forgets the ones that were least
recently used.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from torch import Tensor

from dgemma.config import SLIDING, ModelConfig
from dgemma.model.cache import Row
from dgemma.picture import Placed, within


class Pages:
    """The keys of a growing sequence's full pages. `salt` parts those that must not share, such as tenants.

    pictures: those in the sequence, in order.
    """

    def __init__(self, size: int, salt: str = "", pictures: Sequence[Placed] = ()):
        self.size, self.keys, self.pictures = size, list[bytes](), pictures
        self._salt, self._rest = salt.encode(), np.empty(0, np.int32)

    @property
    def length(self) -> int:
        return len(self.keys) * self.size + len(self._rest)

    def extend(self, tokens: Tensor) -> None:
        ids = np.concatenate([self._rest, tokens.numpy(force=True).astype(np.int32)])
        full = len(ids) // self.size * self.size
        for page in ids[:full].reshape(-1, self.size):
            before = self.keys[-1] if self.keys else self._salt
            begin = len(self.keys) * self.size
            # Where a picture lies in the page counts too: its tokens all look alike.
            shown = b"".join(
                each.picture.digest + each.begin.to_bytes(4, "little", signed=True)
                for each in within(self.pictures, begin, begin + self.size)
            )
            self.keys.append(blake2b(before + page.tobytes() + shown, digest_size=16).digest())
        self._rest = ids[full:]


@dataclass(frozen=True)
class _Page:
    tensors: dict[str, Tensor]
    nbytes: int


class PrefixCache:
    """At most `limit` bytes of pages; 0 keeps none."""

    def __init__(self, config: ModelConfig, limit: int):
        self.config, self.limit, self.page = config, limit, config.canvas_length
        self.nbytes = 0
        self._pages: OrderedDict[bytes, _Page] = OrderedDict()

    def __len__(self) -> int:
        return len(self._pages)

    def find(self, pages: Pages) -> Row:
        """A row that holds as many of the sequence's first pages as are known, but never all of its tokens."""
        known: list[_Page] = []
        keys = pages.keys[: (pages.length - 1) // self.page]
        for key in keys:
            page = self._pages.get(key)
            if page is None:
                break
            known.append(page)
        while not self._may_go_on(pages, len(known) * self.page):
            known.pop()
        self._touch(keys[: len(known)])
        row = Row(len(known) * self.page)
        reached = self.config.first_reached(SLIDING, row.length) // self.page
        for kind, tensors in row.pages.items():
            from_here = reached if kind == SLIDING else 0
            tensors += [page.tensors.get(kind) if i >= from_here else None for i, page in enumerate(known)]
        return row

    def _may_go_on(self, pages: Pages, at: int) -> bool:
        """Not within a picture of which a sliding layer would have let go."""
        window = self.config.prefix_window
        return not any(each.begin < at < each.end and at - each.begin > window for each in pages.pictures)

    def add(self, pages: Pages, row: Row) -> None:
        """Takes the full pages of a row whose tokens these are; what a sliding layer has let go of is not complete."""
        if not self.limit:
            return
        keys = pages.keys[: row.length // self.page]
        for number, key in enumerate(keys):
            if key in self._pages:
                continue
            tensors = {kind: kept[number] for kind, kept in row.pages.items() if number < len(kept)}
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
