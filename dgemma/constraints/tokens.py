"""An automaton over bytes carried over to a tokenizer's tokens."""

from functools import lru_cache
from typing import Any

import numpy as np

from dgemma.constraints.automaton import Automaton
from dgemma.decoding.constraint import TokenAutomaton
from dgemma.text.tokenizer import Tokenizer

LIMIT = 50_000_000
"""Entries of the table: what bounds memory and time."""
DEAD = 0
"""The way that leads from nowhere to nowhere."""


def lift(automaton: Automaton, tokenizer: Tokenizer, size: int, ends: tuple[int, ...], pad: int) -> TokenAutomaton:
    """Over `size` token ids. Behind a whole text one of `ends` may stand, and behind that only more of them and pads.

    ValueError for a special token that the tokenizer lacks, and for an automaton that is too large.
    """
    count = len(automaton.transitions)
    end = count  # one more state: behind an end token
    ways = _Ways(np.vstack([automaton.transitions, np.full_like(automaton.transitions[:1], -1)]))
    ids, first, data = _spelled(tokenizer)
    classes = np.zeros(size, np.int32)
    inside = ids < size
    classes[ids[inside]] = ways.of(data, first[:-1][inside], np.diff(first)[inside])
    for column, name in enumerate(automaton.specials, 256):
        token = tokenizer.id(name)
        if token is None:
            raise ValueError(f"the constraint needs the token {name}, which this tokenizer does not have")
        classes[token] = ways.add(ways.steps[:, column])
    for token in {*ends, pad}:
        way = ways.vectors[classes[token]].copy()
        if token in ends:
            way[:count][automaton.accepting] = end
        way[end] = end
        classes[token] = ways.add(way)
    kept, numbered = np.unique(np.append(classes, DEAD), return_inverse=True)
    return TokenAutomaton(numbered[:-1].astype(np.int32), ways.table(kept), np.append(automaton.accepting, True))


class _Ways:
    """The distinct functions from states to states that tokens stand for, as vectors with -1 for nowhere.

    A token's way is that of its bytes one after the other; most tokens share theirs with many others.
    """

    def __init__(self, steps: np.ndarray):
        self.steps = steps
        self.kinds, self.kind = np.unique(steps[:, :256], axis=1, return_inverse=True)  # bytes that never differ
        self.vectors = [np.full(len(steps), -1, np.int32)]
        self._known = {self.vectors[DEAD].tobytes(): DEAD}

    def add(self, vector: np.ndarray) -> int:
        vector = np.ascontiguousarray(vector, np.int32)
        number = self._known.setdefault(vector.tobytes(), len(self.vectors))
        if number == len(self.vectors):
            self.vectors.append(vector)
            if number * len(vector) > LIMIT:
                raise ValueError("the constraint is too large for this tokenizer's vocabulary; simplify it")
        return number

    def of(self, data: np.ndarray, begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The ways of texts: of data[begins[i] : begins[i] + lengths[i]], all at least one byte long."""
        ways: Any = np.full(len(begins), self.add(np.arange(len(self.steps))))
        for depth in range(int(lengths.max(initial=0))):
            going = ((lengths > depth) & (ways != DEAD)).nonzero()[0]
            kinds = self.kinds.shape[1]
            pairs = ways[going] * kinds + self.kind.reshape(-1)[data[begins[going] + depth]]
            wanted = np.zeros(len(self.vectors) * kinds, np.int32)
            wanted[pairs] = 1
            for pair in wanted.nonzero()[0]:
                way, kind = divmod(int(pair), kinds)
                before = self.vectors[way]
                wanted[pair] = self.add(np.where(before >= 0, self.kinds[before, kind], -1))
            ways[going] = wanted[pairs]
        return ways

    def table(self, kept: np.ndarray) -> np.ndarray:
        return np.stack([self.vectors[way] for way in kept], axis=1)


@lru_cache(maxsize=4)
def _spelled(tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids of the tokens that are text, where each one's bytes begin, with the end, and all the bytes."""
    spelled = tokenizer.spellings()
    first = np.cumsum([0, *map(len, spelled.values())])
    return np.array(list(spelled), np.int64), first, np.frombuffer(b"".join(spelled.values()), np.uint8)
