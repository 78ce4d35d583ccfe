"""Many answers at once, and the figures that they come to."""

from collections.abc import Mapping
from dataclasses import dataclass

import pytest

import dgemma
from dgemma.evals import tasks
from dgemma.evals.measure import Result, measure, summary, wilson
from dgemma.evals.tasks import Answer, Item, Score
from dgemma.language_model import Generation, LanguageModel


@dataclass
class Length:
    """A task whose answer is right if it has as many characters as the item says."""

    wanted: int = 0

    def check(self, item: Item, answer: Answer) -> Score:
        return Score(len(answer.text) == self.wanted, True, {"length": float(len(answer.text))})


def item(text: str, level: str = "one") -> Item:
    return Item(({"role": "user", "content": text}, {"role": "assistant", "content": "yes"}), level)


def result(
    level: str, exact: bool, tokens: int, steps: list[int], converged: bool, parts: Mapping[str, float]
) -> Result:
    answer = Generation("", [0] * tokens, "stop", steps, [converged] * len(steps), 0.0, 1, 0, {})
    return Result(item("", level), answer, Score(exact, True, parts))


def test_results_do_not_depend_on_the_batch(random_lm: LanguageModel) -> None:
    items = [item("ab" * n) for n in (1, 30, 4, 12, 7)]
    told: list[int] = []
    alone = measure(random_lm, items, Length(), batch=1, seed=5)
    together = measure(random_lm, items, Length(), batch=3, seed=5, progress=told.append)
    assert [r.answer.tokens for r in alone] == [r.answer.tokens for r in together]
    assert [r.steps for r in alone] == [r.steps for r in together]
    assert [r.item for r in together] == items
    assert told == [1, 2, 3, 4, 5]
    # Each is what the model says to this question with this seed by itself.
    for i, got in enumerate(together):
        assert got.answer.tokens == random_lm.generate(items[i].question[0]["content"], seed=5 + i).tokens
        assert got.score.parts["length"] == len(got.text)


def test_options_reach_the_decoding(random_lm: LanguageModel) -> None:
    (short,) = measure(random_lm, [item("abc")], Length(), max_denoising_steps=1, max_new_tokens=7)
    assert short.steps == 1
    assert len(short.answer.tokens) <= 7
    with pytest.raises(ValueError, match="max_new_tokens"):
        measure(random_lm, [item("abc")], Length(), max_new_tokens=0)


def test_a_summary_has_a_row_for_each_level_and_one_for_all() -> None:
    rows = summary(
        [
            result("hard", True, tokens=10, steps=[2, 3], converged=True, parts={"cells": 1.0}),
            result("easy", False, tokens=20, steps=[1], converged=False, parts={}),
            result("hard", False, tokens=30, steps=[9], converged=True, parts={"cells": 0.5}),
        ]
    )
    assert [(r.level, r.count) for r in rows] == [("hard", 2), ("easy", 1), ("all", 3)]
    hard, easy, whole = rows
    assert (hard.exact.share, easy.exact.share, whole.exact.share) == (0.5, 0.0, pytest.approx(1 / 3))
    assert whole.valid.share == whole.valid.high == 1.0
    assert (hard.parts, easy.parts, whole.parts) == ({"cells": 0.75}, {}, {"cells": 0.75})
    assert (hard.steps, whole.steps) == (7.0, 5.0)
    # Tokens over steps, not the mean of the answers' quotients.
    assert whole.tokens_per_forward == 60 / 15
    assert whole.converged == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="no results"):
        summary([])


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_intervals_are_the_published_ones(hits: int, count: int, low: float, high: float) -> None:
    assert wilson(hits, count) == pytest.approx((low, high), abs=5e-5)
    below, above = wilson(count - hits, count)
    assert (1 - above, 1 - below) == pytest.approx((low, high), abs=5e-5)


def test_answers_can_be_kept_to_what_is_asked_for() -> None:
    tiny, sudoku = dgemma.load("tiny", "cpu"), dgemma.load("sudoku", "cpu")
    tiny.model.init_weights(0)
    sudoku.model.init_weights(0)
    options = {"max_denoising_steps": 2, "constrain": True}
    task = tasks.get("extraction")
    free = measure(tiny, tasks.items(task, 6, 0, held_out=True), task, max_denoising_steps=2)
    assert not any(r.score.valid for r in free)
    for name, lm in (("extraction", tiny), ("sudoku", sudoku)):
        task = tasks.get(name)
        results = measure(lm, tasks.items(task, 6, 0, held_out=True), task, **options)
        if name == "extraction":
            assert all(r.score.valid for r in results)
        else:
            assert all(r.score.parts["clues kept"] == 1 for r in results)
        assert all(r.finish_reason == "stop" for r in results)
    task = tasks.get("tools")
    for item, result in zip(
        some := tasks.items(task, 10, 0, held_out=True), measure(tiny, some, task, **options), strict=True
    ):
        if item.answer.get("tool_calls"):
            assert result.answer.tool_calls
            assert result.answer.tool_calls[0].name in {tool["function"]["name"] for tool in item.tools}
