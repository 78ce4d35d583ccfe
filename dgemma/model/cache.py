"""Keys and values of what has been encoded, in pages of one canvas.

A full-attention layer keeps every page of a row; a sliding layer drops the pages that no window reaches. A page that is
full is never written again, so rows may share it (`fork`); reference counts free it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dgemma.config import FULL, SLIDING, ModelConfig
from dgemma.kernels.replay import Replay
from dgemma.model.attention import Span
from dgemma.model.kv_formats import PLAIN, PageFormat


@dataclass
class Row:
    """One sequence: its length in tokens and, for each kind of layer, its pages [layers, 2, K, page, D] by index.

    A dropped page of a sliding layer is None. In 8 bits a scale lies behind the D columns (see `PageFormat`).
    """

    length: int = 0
    pages: dict[str, list[Tensor | None]] = field(default_factory=lambda: {SLIDING: [], FULL: []})


class Cache:
    """Keys and values of B rows. `model.encode` appends to it; `model.denoise` only reads it."""

    def __init__(
        self,
        config: ModelConfig,
        rows: int,
        dtype: torch.dtype,
        device: torch.device,
        format: PageFormat = PLAIN,
    ):
        self.config, self.dtype, self.device, self.format = config, dtype, device, format
        self.page = config.canvas_length
        self.rows = [Row() for _ in range(rows)]
        self._index = [config.layer_types[:i].count(kind) for i, kind in enumerate(config.layer_types)]
        self._gathered: dict[tuple[int, int], tuple[tuple[int, ...], tuple[Tensor, Tensor]]] = {}
        self._selected: dict[tuple[int, ...], Cache] = {}
        self._replay: tuple[list[int], Replay] | None = None

    @property
    def lengths(self) -> list[int]:
        """Tokens encoded so far, a row."""
        return [row.length for row in self.rows]

    @property
    def nbytes(self) -> int:
        """Bytes of the pages held; a page that rows share counts once."""
        pages = {id(p): p for row in self.rows for kind in row.pages.values() for p in kind if p is not None}
        return sum(page.nbytes for page in pages.values())

    def replay(self) -> Replay:
        """What was recorded of a step behind these rows, since they are as long as they are."""
        if self._replay is None or self._replay[0] != self.lengths:
            self._replay = self.lengths, Replay()
        return self._replay[1]

    def select(self, rows: Sequence[int]) -> "Cache":
        """Some rows of this cache as a cache: what is encoded there is encoded here."""
        if list(rows) == list(range(len(self.rows))):
            return self
        key = tuple(rows)
        if key not in self._selected:
            part = Cache(self.config, 0, self.dtype, self.device, self.format)
            part.rows = [self.rows[row] for row in rows]
            lengths, index = tuple(self.lengths), torch.tensor(key, device=self.device)
            for (layer, first), (gathered, pair) in self._gathered.items():
                if first == 0 and gathered == lengths:  # all rows lie side by side already
                    keys, values = (side.index_select(0, index) for side in pair)
                    part._gathered[layer, 0] = tuple(part.lengths), (keys, values)
            self._selected = {key: part}
        return self._selected[key]

    def fork(self, rows: Sequence[int] | None = None) -> "Cache":
        """A cache that continues from these rows (all, if not told) and leaves them as they are.

        Full pages are shared; the page that is still being filled is copied. A row may be named several times.
        """
        sources = self.rows if rows is None else [self.rows[row] for row in rows]
        fork = Cache(self.config, len(sources), self.dtype, self.device, self.format)
        for copy, source in zip(fork.rows, sources, strict=True):
            full = source.length // self.page
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
            columns = self.config.head_size(layers[0]) + self.format.scale_bytes
            shape = (len(layers), 2, self.config.kv_heads(layers[0]), self.page, columns)
            while len(pages) < wanted:
                pages.append(torch.empty(shape, dtype=self.format.dtype(self.dtype), device=self.device))

    def advance(self, row: int, tokens: int) -> None:
        """Counts `tokens` as encoded and lets go of pages that no sliding layer reaches any more."""
        state = self.rows[row]
        state.length += tokens
        sliding = state.pages[SLIDING]
        out_of_reach = min(self.config.first_reached(SLIDING, state.length) // self.page, len(sliding))
        sliding[:out_of_reach] = [None] * out_of_reach

    def write(self, layer: int, span: Span, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores keys and values [B, K, T, D] behind each row's encoded length (see `reserve`); returns what is read
        of them later."""
        keys, values = self.format.encode(keys), self.format.encode(values)
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
        return self.format.decode(keys, self.dtype), self.format.decode(values, self.dtype)

    def read(self, layer: int, span: Span) -> tuple[Tensor, Tensor] | None:
        """Keys and values [B, K, S, D] of what the span reaches, gathered once between two writes."""
        if span.past == 0:
            return None
        rows = self.rows[span.row : span.row + span.rows]
        if span.causal:  # a chunk of a prompt reads once: nothing is kept
            return self._joined(layer, rows)
        key, lengths = (layer, span.row), tuple(row.length for row in rows)
        if key not in self._gathered or self._gathered[key][0] != lengths:
            self._gathered[key] = lengths, self._joined(layer, rows)
        return self._gathered[key][1]

    def _joined(self, layer: int, rows: list[Row]) -> tuple[Tensor, Tensor]:
        parts = [self._gather(layer, row) for row in rows]
        stored = torch.stack(parts) if len(parts) > 1 else parts[0][None]
        joined = self.format.decode(stored, self.dtype)
        return joined[:, 0], joined[:, 1]

    def _gather(self, layer: int, row: Row) -> Tensor:
        """[2, K, S, D] of one row, as it is stored."""
        kind, index = self.config.layer_types[layer], self._index[layer]
        start = self.config.first_reached(kind, row.length)
        first, last = start // self.page, -(-row.length // self.page)
        parts = [page[index] for page in row.pages[kind][first:last] if page is not None]
        joined = torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]
        return joined[:, :, start - first * self.page : row.length - first * self.page]
