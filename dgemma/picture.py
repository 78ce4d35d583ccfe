"""A picture as the network reads it, and its place among tokens: what media makes and the model takes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np


class Picture(Protocol):
    """An image in patches.

    patches: uint8 [rows · columns, values], row by row, a patch's values ordered (row, column, channel); rows and
    columns are multiples of the tower's pooling. digest: the same for the same content, whatever file it came from.
    """

    @property
    def patches(self) -> "np.ndarray": ...
    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...
    @property
    def digest(self) -> bytes: ...


@dataclass(frozen=True, eq=False)
class Patches:
    """A Picture that is held."""

    patches: "np.ndarray"
    rows: int
    columns: int

    @cached_property
    def digest(self) -> bytes:
        shape = f"{self.rows}x{self.columns}:".encode()
        return blake2b(shape + self.patches.tobytes(), digest_size=16).digest()


@dataclass(frozen=True)
class Placed:
    """A picture whose soft tokens stand for the tokens at `begin` … `end` - 1.

    Positions count from the first token of whatever it is given with; below 0 they lie before it, in the cache.
    """

    picture: Picture
    begin: int
    end: int

    def moved(self, by: int) -> "Placed":
        return Placed(self.picture, self.begin + by, self.end + by)


def within(pictures: Sequence[Placed], begin: int, end: int) -> list[Placed]:
    """Those that have a token in `begin` … `end` - 1, counted from `begin`."""
    return [each.moved(-begin) for each in pictures if max(each.begin, begin) < min(each.end, end)]


def pieces(length: int, pictures: Sequence[Placed], size: int) -> Iterator[tuple[int, int]]:
    """Begins and ends of pieces of about `size` tokens; none ends within a picture, whose tokens see each other."""
    begin = 0
    while begin < length:
        end = uncut(begin, min(begin + size, length), pictures)
        yield begin, end
        begin = end


def uncut(begin: int, end: int, pictures: Sequence[Placed]) -> int:
    """`end`, or, where that lies within a picture, the picture's begin, or its end if it is the first thing."""
    cut = next((each for each in pictures if each.begin < end < each.end), None)
    if cut is None:
        return end
    return cut.begin if cut.begin > begin else cut.end


@dataclass(frozen=True, eq=False)
class Clip:
    """A video: frames with the second at which each is seen."""

    frames: tuple[tuple[float, Picture], ...]


@dataclass(frozen=True)
class Prompted:
    """A prompt as the model reads it: token ids, and the pictures that some of them stand for, in order."""

    tokens: list[int]
    pictures: tuple[Placed, ...] = ()

    def part(self, begin: int, end: int | None = None) -> "Prompted":
        """Tokens `begin` … `end` - 1 and their pictures."""
        tokens = self.tokens[begin:end]
        return Prompted(tokens, tuple(within(self.pictures, begin, begin + len(tokens))))

    def begins_with(self, other: "Prompted") -> bool:
        """Whether its first tokens are the other's, and show the same."""
        shown = [(each.begin, each.end, each.picture.digest) for each in self.part(0, len(other.tokens)).pictures]
        same = [(each.begin, each.end, each.picture.digest) for each in other.pictures]
        return self.tokens[: len(other.tokens)] == other.tokens and shown == same
