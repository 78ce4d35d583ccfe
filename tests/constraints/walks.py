"""Random texts of an automaton."""

import random

import numpy as np

from dgemma.constraints.automaton import Automaton

FAR = 10**6


class Walker:
    """Draws accepted texts: some steps at random, then the shortest way to an end."""

    def __init__(self, automaton: Automaton, seed: int = 0):
        self.automaton = automaton
        self.rng = random.Random(seed)
        self.ways: dict[int, dict[int, list[int]]] = {}
        steps = automaton.transitions
        distance = np.where(automaton.accepting, 0, FAR)
        while True:
            behind = np.where(steps >= 0, distance[steps], FAR).min(axis=1) + 1
            if not (behind < distance).any():
                break
            distance = np.minimum(distance, behind)
        self.distance = distance

    def leaving(self, state: int) -> dict[int, list[int]]:
        """The states that come next, and by which columns."""
        if state not in self.ways:
            ways: dict[int, list[int]] = {}
            for symbol, then in enumerate(self.automaton.transitions[state].tolist()):
                if then >= 0:
                    ways.setdefault(then, []).append(symbol)
            self.ways[state] = ways
        return self.ways[state]

    def columns(self, steps: int) -> list[int]:
        state, symbols = 0, []
        while not (self.automaton.accepting[state] and (len(symbols) >= steps or self.rng.random() < 0.1)):
            ways = self.leaving(state)
            if not ways:
                break
            near = [then for then in ways if self.distance[then] < self.distance[state]]
            then = self.rng.choice(near if len(symbols) >= steps and near else list(ways))
            symbols.append(self.rng.choice(ways[then]))
            state = then
        return symbols

    def text(self, steps: int = 40) -> str:
        """An accepted text; special tokens by their spelling. Fails if it is not UTF-8."""
        pieces = [
            bytes([symbol]) if symbol < 256 else self.automaton.specials[symbol - 256].encode()
            for symbol in self.columns(steps)
        ]
        return b"".join(pieces).decode()
