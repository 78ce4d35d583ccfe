"""The dynamic programming against enumeration: every canvas of a small automaton, counted one by one."""

import itertools

import numpy as np
import pytest
import torch
from parity.trajectory import CONFIG

from dgemma.decoding.constraint import Guide, TokenAutomaton
from dgemma.decoding.guided import by_class, read_guided
from dgemma.decoding.vocabulary import read
from dgemma.kernels import native
from dgemma.model.head import TiedEmbedding

STATES, TOKENS, LENGTH = 4, 7, 5


def automaton(rng: np.random.Generator) -> TokenAutomaton:
    """Tokens 0 and 1 share a class, token 6 stands nowhere."""
    classes = np.array([1, 1, 2, 3, 4, 5, 0], np.int32)
    table = rng.integers(-1, STATES, (STATES, 6)).astype(np.int32)
    table[:, 0] = -1
    return TokenAutomaton(classes, table, rng.random(STATES) < 0.5)


def guides(count: int, pinned: bool = False) -> list[Guide]:
    rng = np.random.default_rng(3 + pinned)
    found: list[Guide] = []
    while len(found) < count:
        pins = {1: int(rng.integers(0, 6)), 3: 2} if pinned else {}
        guide = Guide(automaton(rng), int(rng.integers(STATES)), rng.random(STATES) < 0.4, pins, LENGTH)
        if canvases(guide):
            found.append(guide)
    return found


def canvases(guide: Guide) -> list[tuple[int, ...]]:
    """All that fit."""
    every = itertools.product(range(TOKENS), repeat=LENGTH)
    whole = lambda c: (q := guide.automaton.after(c, guide.state)) >= 0 and guide.ends[q]  # noqa: E731
    return [c for c in every if all(c[i] == t for i, t in guide.pins.items()) and whole(c)]


def beliefs(seed: int, spread: float) -> np.ndarray:
    """log2 weights [C, V]."""
    return np.random.default_rng(seed).normal(0, spread, (LENGTH, TOKENS))


def classed(guide: Guide, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    kinds = guide.automaton.table.shape[1]
    sums, peaks = np.full((LENGTH, kinds), -1e30), np.full((LENGTH, kinds), -1e30)
    for kind in range(1, kinds):
        own = weights[:, guide.automaton.classes == kind]
        peaks[:, kind], sums[:, kind] = own.max(1), np.logaddexp2.reduce(own, axis=1)
    return sums, peaks


def logs(guide: Guide, weights: np.ndarray, found: list[tuple[int, ...]]) -> np.ndarray:
    free = [i for i in range(LENGTH) if i not in guide.pins]
    return np.array([sum(weights[i, c[i]] for i in free) for c in found])


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("spread", [1.0, 30.0, 3000.0])
def test_marginals_are_those_of_enumeration(spread: float, pinned: bool) -> None:
    for number, guide in enumerate(guides(12, pinned)):
        weights, found = beliefs(number, spread), canvases(guide)
        solution = guide.solve(*classed(guide, weights), np.zeros(LENGTH))
        scores = logs(guide, weights, found)
        shares = np.exp2(scores - np.logaddexp2.reduce(scores))
        for i in range(LENGTH):
            if i in guide.pins:
                continue
            expected = np.bincount([c[i] for c in found], shares, TOKENS)
            z = weights[i] + solution.bonus[i][guide.automaton.classes]
            np.testing.assert_allclose(np.exp2(z - np.logaddexp2.reduce(z)), expected, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("spread", [1.0, 3000.0])
def test_the_best_canvas_is_that_of_enumeration(spread: float) -> None:
    for number, guide in enumerate(guides(12) + guides(12, pinned=True)):
        weights, found = beliefs(number, spread), canvases(guide)
        solution = guide.solve(*classed(guide, weights), np.zeros(LENGTH))
        best = found[int(logs(guide, weights, found).argmax())]
        assert solution.best.tolist() == guide.automaton.classes[list(best)].tolist()


def test_proposals_are_drawn_from_all_canvases_that_fit() -> None:
    guide, draws = guides(1)[0], 4000
    weights, found = beliefs(0, 1.0), canvases(guide)
    sums, peaks = classed(guide, weights)
    scores = logs(guide, weights, found)
    shares = np.exp2(scores - np.logaddexp2.reduce(scores))
    kinds: dict[tuple[int, ...], float] = {}
    for canvas, share in zip(found, shares, strict=True):
        key = tuple(guide.automaton.classes[list(canvas)])
        kinds[key] = kinds.get(key, 0.0) + share
    rng = np.random.default_rng(0)
    counts = dict.fromkeys(kinds, 0)
    lefts = []
    for _ in range(draws):
        solution = guide.solve(sums, peaks, rng.random(LENGTH))
        counts[tuple(solution.drawn)] += 1  # a KeyError is a canvas that does not fit
        lefts.append(solution.left)
    expected = np.array([share * draws for share in kinds.values()])
    often = expected > 5
    surprise = ((np.array(list(counts.values())) - expected) ** 2 / expected)[often].sum()
    assert surprise < often.sum() + 4 * np.sqrt(2 * often.sum())
    # What is left of a draw is uniform again, whatever it chose.
    assert np.abs(np.quantile(np.concatenate(lefts), [0.25, 0.5, 0.75]) - [0.25, 0.5, 0.75]).max() < 0.02


def test_the_slow_way_and_the_fast_way_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    for number, guide in enumerate(guides(8)):
        arguments = (*classed(guide, beliefs(number, 5.0)), np.random.default_rng(number).random(LENGTH))
        fast = guide.solve(*arguments)
        with monkeypatch.context() as patch:
            patch.setattr("dgemma.decoding.constraint.SMALL", np.inf)
            slow = guide.solve(*arguments)
        assert (fast.best == slow.best).all()
        assert (fast.drawn == slow.drawn).all()
        inside = (fast.bonus > -1e29) & (slow.bonus > -1e29)
        assert (inside == (fast.bonus > -1e29)).all()
        shift = [(f - s)[i] for f, s, i in zip(fast.bonus, slow.bonus, inside, strict=True)]
        assert all(np.ptp(differences) < 1e-9 for differences in shift if len(differences))


def test_before_is_one_token_back() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, ends = automaton(rng), rng.random(STATES) < 0.4
        for pin in (None, 0, 5, 6):
            tokens = range(TOKENS) if pin is None else [pin]
            reached = [[a.after([token], q) for token in tokens] for q in range(STATES)]
            assert a.before(ends, pin).tolist() == [any(q >= 0 and ends[q] for q in after) for after in reached]


@pytest.mark.parametrize("many", [1, 3, 100])
def test_sums_by_class_never_vanish(many: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dgemma.decoding.constraint.MANY", many)
    rng = np.random.default_rng(0)
    classes = np.array([1, 3, 2, 1, 0, 3, 3, 2, 1, 3, 4], np.int32)
    of = TokenAutomaton(classes, np.array([[-1, 0, 0, 0, 0]], np.int32), np.array([True]))
    weights = rng.uniform(-150, 150, (3, len(classes))).astype(np.float32)
    weights[0, classes == 2] = -900  # farther away than float32 reaches
    peaks, sums = by_class(torch.from_numpy(weights[:, of.order].T.copy()), of)
    for kind in range(1, 5):
        own = weights[:, classes == kind].astype(np.float64)
        expected = np.logaddexp2.reduce(own, axis=1)
        np.testing.assert_allclose(sums[:, kind - 1], expected, atol=1.01 if kind == 2 else 1e-4)
        np.testing.assert_array_equal(peaks[:, kind - 1], own.max(1).astype(np.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tile", [0, 1, 1 << 20])
def test_an_automaton_that_forbids_nothing_changes_nothing(
    tile: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guided pass against the plain one; and with half of the vocabulary forbidden against that half alone."""
    if tile:
        monkeypatch.setattr("dgemma.decoding.guided.TILE_BYTES", tile)
        monkeypatch.setattr(native, "library", lambda: None)
    head = TiedEmbedding(CONFIG)
    with torch.no_grad():
        head.weight.normal_(0, 2, generator=torch.Generator().manual_seed(0))
    head = head.to(dtype)
    size, length = CONFIG.vocab_size, 6
    states = torch.randn(1, length, CONFIG.hidden_size, generator=torch.Generator().manual_seed(1)).to(dtype)
    uniform = torch.rand(1, length, generator=torch.Generator().manual_seed(2))
    for temperature in (torch.tensor([0.8]), torch.tensor([0.4])):
        plain = read(head, states, temperature, uniform)
        every = np.where(np.arange(size) % 3 == 0, 1, 2).astype(np.int32)
        for bound in (length, 4):
            for classes, table in ((every, [[-1, 0, 0]]), (np.where(np.arange(size) < size // 2, 1, 0), [[-1, 0]])):
                automaton = TokenAutomaton(classes.astype(np.int32), np.array(table, np.int32), np.array([True]))
                guide = Guide(automaton, 0, automaton.done, {}, bound)
                found = read_guided(head, states, temperature, uniform, guide, 1e9)
                if classes is every:
                    wanted = plain
                else:
                    banned = torch.arange(size // 2, size)
                    where = (torch.arange(length) < bound)[None, :, None].expand(1, length, len(banned))
                    wanted = read(head, states, temperature, uniform, banned=(banned, where))
                assert torch.equal(found.best, wanted.best)
                assert torch.allclose(found.entropy, wanted.entropy, atol=2e-5)
                # What is fed back stays what the network believes.
                assert found.soft is not None
                assert plain.soft is not None
                rough = 1e-5 if dtype == torch.float32 else 0.05
                assert torch.allclose(found.soft, plain.soft, atol=rough * float(plain.soft.abs().max()))
