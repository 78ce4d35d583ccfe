"""Infill: pins hold, candidates share one prefix, and the ranking is that of independent scoring."""

from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from random_models import random_lm

import dgemma
from dgemma import embedded
from dgemma.decoding import blocks
from dgemma.decoding.events import Finished
from dgemma.infill import Infill, gap_lengths
from dgemma.language_model import LanguageModel, Prompt
from dgemma.model.cache import Cache
from dgemma.model.network import DiffusionGemma

PREFIX, SUFFIX = "the cat ", " sang and\nthe dog"


def watched(lm: LanguageModel, prefix: str, suffix: str, **options: object) -> tuple[Infill, list[Finished], list[int]]:
    """An infill, the whole answers of its rows, and how many tokens each encode took."""
    finished: list[Finished] = []
    encoded: list[int] = []
    generate, encode = blocks.generate, DiffusionGemma.encode

    def keep(model: DiffusionGemma, requests: Sequence[blocks.Request], cache: Cache) -> object:
        for event in generate(model, requests, cache):
            if isinstance(event, Finished):
                finished.append(event)
            yield event

    def count(self: DiffusionGemma, tokens: Sequence[torch.Tensor], cache: Cache, **rest: Any) -> object:
        encoded.append(sum(len(row) for row in tokens))
        return encode(self, tokens, cache, **rest)

    with mock.patch.object(blocks, "generate", keep), mock.patch.object(DiffusionGemma, "encode", count):
        found = lm.infill(prefix, suffix, **options)  # type: ignore[arg-type]
    return found, sorted(finished, key=lambda event: event.row), encoded


@pytest.mark.parametrize("canvas", [8, 16, 40])
@pytest.mark.parametrize("prefix", ["", PREFIX, PREFIX * 12], ids=["empty", "short", "long"])
@pytest.mark.parametrize("suffix", ["s", SUFFIX, SUFFIX * 20], ids=["one", "some", "longer than a canvas"])
def test_the_suffix_stands_behind_every_gap(canvas: int, prefix: str, suffix: str) -> None:
    lm = random_lm(canvas)
    found, rows, _ = watched(lm, prefix, suffix, max_tokens=12)
    after = lm.tokenizer.encode(suffix)
    before = lm.tokenizer.encode(prefix)
    ends = set(lm.defaults.eos_token_id)
    gaps = gap_lengths(12, None, len(after), canvas)
    assert sorted(c.length for c in found.candidates) == gaps
    for gap, row in zip(gaps, rows, strict=True):
        pinned = after[: canvas - gap]
        middle = next(c.tokens for c in found.candidates if c.length == gap)
        inside = len(row.tokens) - gap - len(pinned)
        assert inside in (0, len(before) % canvas)
        assert row.tokens == [*before[len(before) - inside :], *middle, *pinned]
        assert not ends & set(middle)
    assert found.repeated == (len(after) > canvas - max(gaps))
    assert found.text == found.candidates[0].text == lm.tokenizer.decode(found.candidates[0].tokens, skip_special=True)


@pytest.mark.parametrize("prefix", [PREFIX, PREFIX * 12])
def test_the_prefix_is_encoded_once_for_all_candidates(prefix: str) -> None:
    lm = random_lm(40)
    found, _, encoded = watched(lm, prefix, SUFFIX, lengths=[1, 2, 3, 30])
    before, after = len(lm.tokenizer.encode(prefix)), len(lm.tokenizer.encode(SUFFIX))
    *whole, prompts, scoring = encoded
    assert sum(whole) == before  # bos and prefix less the last token, which every row takes for itself
    assert prompts == len(found.candidates)
    assert scoring == sum(c.length + after for c in found.candidates)


@pytest.mark.parametrize("prompt", [None, "sing", [{"role": "user", "content": "sing"}]], ids=["raw", "text", "chat"])
def test_the_ranking_is_that_of_scoring_each_candidate(prompt: Prompt | None) -> None:
    lm = random_lm(40)
    found = lm.infill(PREFIX * 3, SUFFIX, 8, prompt=prompt, seed=2)
    context = [lm.model.config.bos_token_id] if prompt is None else lm.tokens(prompt)
    before, after = lm.tokenizer.encode(PREFIX * 3), lm.tokenizer.encode(SUFFIX)
    assert not found.repeated
    expected = [sum(lm.log_probabilities([*context, *before], [*c.tokens, *after])) for c in found.candidates]
    assert [c.log_probability for c in found.candidates] == pytest.approx(expected, abs=1e-3)
    assert expected == sorted(expected, reverse=True)


def test_a_candidate_does_not_depend_on_its_neighbours_nor_on_the_call() -> None:
    lm = random_lm(16)
    together = lm.infill(PREFIX, SUFFIX, lengths=[2, 5], seed=4)
    alone = lm.infill(PREFIX, SUFFIX, lengths=[5], seed=4)
    assert next(c for c in together.candidates if c.length == 5).tokens == alone.candidates[0].tokens
    assert lm.infill(PREFIX, SUFFIX, lengths=[2, 5], seed=4).candidates == together.candidates
    assert lm.infill(PREFIX, SUFFIX, lengths=[5], seed=5).text != alone.text


def test_without_a_suffix_it_is_a_continuation() -> None:
    lm = random_lm(16)
    found = lm.infill(PREFIX, "", 40, seed=1)
    context = [lm.model.config.bos_token_id]
    before = lm.tokenizer.encode(PREFIX)
    pins = dict(enumerate(before))
    *_, last = lm.stream(context, pins=pins, max_new_tokens=40, seed=1)
    assert isinstance(last, Finished)
    assert found.candidates[0].tokens == last.tokens[len(before) :]
    assert len(found.candidates) == 1


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("prompt", [None, "sing", [2, 40, 41]], ids=["raw", "text", "tokens"])
def test_a_suffix_that_does_not_fit_is_told_in_the_prompt(chat: bool, prompt: Prompt | None) -> None:
    lm, told = random_lm(16, chat), []
    encode = lm.model.encode
    with mock.patch.object(lm.model, "encode", lambda *a, **b: told.append(a[0]) or encode(*a, **b)):  # type: ignore
        found = lm.infill("the cat ", SUFFIX * 5, 6, prompt=prompt)
    context = lm.tokenizer.decode(told[0][0].tolist())
    assert found.repeated
    assert f"the cat <fill>{SUFFIX * 5}" in context
    as_message = chat and prompt != [2, 40, 41]
    assert context.count("<|turn>user") == (1 if as_message or (chat and prompt == "sing") else 0)
    assert ("<turn|>" in context.partition("<fill>")[2]) == as_message
    assert ("sing" in context.partition("<fill>")[0]) == (prompt == "sing")


def test_special_tokens_in_a_text_stay_characters() -> None:
    lm = random_lm(40)
    _, rows, _ = watched(lm, "a<turn|>", "<eos>b", lengths=[2])
    assert not set(lm.defaults.eos_token_id) & set(rows[0].tokens)
    assert lm.tokenizer.decode(rows[0].tokens).endswith("<eos>b")


def test_lengths_grow_about_geometrically_and_fit() -> None:
    assert gap_lengths(64, None, 20, 256) == [1, 2, 3, 6, 11, 20, 35, 64]
    assert gap_lengths(1, None, 20, 256) == [1]
    assert max(gap_lengths(64, None, 500, 16)) == 8
    assert gap_lengths(300, None, 0, 16) == [300]
    for limit in range(1, 300):
        lengths = gap_lengths(limit, None, 5, 256)
        assert len(lengths) <= 8
        assert (lengths[0], lengths[-1]) == (1, min(limit, 251))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1, not 0"),
        ({"lengths": []}, "no lengths"),
        ({"lengths": [3, 0]}, "a length must be at least 1, not 0"),
        ({"lengths": [12]}, "a gap of 12 tokens .* at most 11"),
        ({"max_new_tokens": 5}, "max_tokens"),
        ({"bogus": 1}, "bogus"),
    ],
)
def test_wrong_calls_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        random_lm(16).infill(PREFIX, SUFFIX, **options)  # type: ignore[arg-type]


@pytest.mark.skipif("sudoku" not in embedded.names(), reason="the Sudoku model is not in this checkout")
def test_a_gap_in_a_solved_sudoku_is_filled() -> None:
    lm = dgemma.load("sudoku", "cpu")
    puzzle = "53..7.912 6..195..8 198...567 .5.76..23 4.68.3.91 7.39.4..6 9615..284 2.74196.5 3..28.1.9"
    solution = lm.generate(puzzle).text
    assert lm.task is not None
    assert lm.task.check(puzzle, solution).right
    for start, stop in ((0, 5), (38, 50), (80, 86)):
        found = lm.infill(solution[:start], solution[stop:], lengths=[stop - start], prompt=puzzle)
        assert found.text == solution[start:stop]
