"""Keys and values of what has been encoded, in pages of one canvas.

A full-attention layer keeps every page of a row; a sliding layer drops the pages that no window reaches. A page that is
full is never written again, so rows may share it (`fork`); reference counts free it.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dgemma.config import FULL, SLIDING, ModelConfig
from dgemma.model.attention import Span


@dataclass
class Row:
    """One sequence: its length in tokens and, for each kind of layer, its pages [layers, 2, K, page, D] by index.

    A dropped page of a sliding layer is None.
    """

    length: int = 0
    pages: dict[str, list[Tensor | None]] = field(default_factory=lambda: {SLIDING: [], FULL: []})


class Cache:
    """Keys and values of B rows. `model.encode` appends to it; `model.denoise` only reads it."""

    def __init__(self, config: ModelConfig, rows: int, dtype: torch.dtype, device: torch.device):
        self.config, self.dtype, self.device = config, dtype, device
        self.page = config.canvas_length
        self.rows = [Row() for _ in range(rows)]
        self._index = [config.layer_types[:i].count(kind) for i, kind in enumerate(config.layer_types)]
        self._gathered: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    @property
    def lengths(self) -> list[int]:
        """Tokens encoded so far, a row."""
        return [row.length for row in self.rows]

    @property
    def nbytes(self) -> int:
        """Bytes of the pages held; a page that rows share counts once."""
        pages = {id(p): p for row in self.rows for kind in row.pages.values() for p in kind if p is not None}
        return sum(page.nbytes for page in pages.values())

    def fork(self, row: int, copies: int) -> "Cache":
        """A cache whose rows all continue from `row`: full pages are shared, the one still being filled is copied."""
        fork = Cache(self.config, copies, self.dtype, self.device)
        source = self.rows[row]
        full = source.length // self.page
        for copy in fork.rows:
            copy.length = source.length
            for kind, pages in source.pages.items():
                copy.pages[kind] = [p if i < full or p is None else p.clone() for i, p in enumerate(pages)]
        return fork

    def reserve(self, row: int, tokens: int) -> None:
        """Makes room for `tokens` more in a row; nothing counts as encoded until `advance`."""
        wanted = -(-(self.rows[row].length + tokens) // self.page)
        for kind, pages in self.rows[row].pages.items():
            layers = [i for i, t in enumerate(self.config.layer_types) if t == kind]
            if not layers:
                continue
            shape = (len(layers), 2, self.config.kv_heads(layers[0]), self.page, self.config.head_size(layers[0]))
            while len(pages) < wanted:
                pages.append(torch.empty(shape, dtype=self.dtype, device=self.device))

    def advance(self, row: int, tokens: int) -> None:
        """Counts `tokens` as encoded and lets go of pages that no sliding layer reaches any more."""
        state = self.rows[row]
        state.length += tokens
        out_of_reach = max(0, state.length - self.config.prefix_window) // self.page
        sliding = state.pages[SLIDING]
        sliding[: min(out_of_reach, len(sliding))] = [None] * min(out_of_reach, len(sliding))
        self._gathered.clear()

    def write(self, layer: int, span: Span, keys: Tensor, values: Tensor) -> None:
        """Stores keys and values [B, K, T, D] behind each row's encoded length (see `reserve`)."""
        kind, index = self.config.layer_types[layer], self._index[layer]
        for i in range(span.rows):
            pages = self.rows[span.row + i].pages[kind]
            done = 0
            while done < span.length:
                number, offset = divmod(span.past + done, self.page)
                count = min(span.length - done, self.page - offset)
                page = pages[number]
                assert page is not None
                page[index, 0, :, offset : offset + count] = keys[i, :, done : done + count]
                page[index, 1, :, offset : offset + count] = values[i, :, done : done + count]
                done += count

    def read(self, layer: int, span: Span) -> tuple[Tensor, Tensor] | None:
        """Keys and values [B, K, S, D] of the encoded tokens that the span reaches, gathered once between two writes."""
        if span.past == 0:
            return None
        key = (layer, span.row)
        if key not in self._gathered:
            rows = [self._gather(layer, self.rows[span.row + i]) for i in range(span.rows)]
            joined = torch.stack(rows) if span.rows > 1 else rows[0][None]
            if span.causal:  # a chunk of a prompt reads once: nothing is kept
                return joined[:, 0], joined[:, 1]
            self._gathered[key] = joined[:, 0], joined[:, 1]
        return self._gathered[key]

    def _gather(self, layer: int, row: Row) -> Tensor:
        """[2, K, S, D] of one row."""
        kind, index = self.config.layer_types[layer], self._index[layer]
        start = max(0, row.length - self.config.prefix_window) if kind == SLIDING else 0
        first, last = start // self.page, -(-row.length // self.page)
        parts = [page[index] for page in row.pages[kind][first:last] if page is not None]
        joined = torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]
        return joined[:, :, start - first * self.page : row.length - first * self.page]


def bytes_per_token(config: ModelConfig, itemsize: int = 2) -> dict[str, int]:
    """Bytes that one cached token takes in all layers of a kind: {"full_attention": …, "sliding_attention": …}."""
    sizes = {FULL: 0, SLIDING: 0}
    for layer, kind in enumerate(config.layer_types):
        sizes[kind] += 2 * config.kv_heads(layer) * config.head_size(layer) * itemsize
    return sizes


def cache_bytes(config: ModelConfig, tokens: int, itemsize: int = 2) -> int:
    """Bytes of the pages that a row of `tokens` holds: full layers grow with it, sliding layers stop at the window."""
    sizes, page = bytes_per_token(config, itemsize), config.canvas_length
    pages = -(-tokens // page)
    dropped = max(0, tokens - config.prefix_window) // page
    return page * (sizes[FULL] * pages + sizes[SLIDING] * (pages - dropped))
