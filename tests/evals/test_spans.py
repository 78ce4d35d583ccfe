"""Spans cut out of right answers: the cut itself, and a model that knows them."""

import json
import random
import sys
from types import SimpleNamespace

import pytest

import dgemma
from dgemma import cli, embedded, language_model
from dgemma.evals import spans, tasks
from dgemma.evals.spans import LONGEST, cut, measure_spans, summary
from dgemma.evals.tasks import Item
from dgemma.language_model import LanguageModel


@pytest.mark.parametrize("length", [1, 2, 3, 20, 200])
def test_a_cut_leaves_something_behind_it(length: int) -> None:
    tokens, seen = list(range(length)), set()
    for seed in range(200):
        prefix, span, suffix = cut(tokens, random.Random(seed))
        assert prefix + span + suffix == tokens
        assert 1 <= len(span) <= max(1, min(LONGEST, length // 2))
        assert suffix or length == 1
        seen.add(len(span))
    assert len(seen) == max(1, min(LONGEST, length // 2))


def test_each_way_counts_what_it_gives(random_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Infill that knows the answer only if it is told the length; left to right never does."""
    items = tasks.items(tasks.get("python"), 4, 0, held_out=True)
    answers = {json.dumps(list(item.question)): item.answer["content"] for item in items}

    def known(self: LanguageModel, prefix: str, suffix: str, *, lengths: list[int], prompt: list[int], **_: object):
        whole = next(a for a in answers.values() if a.startswith(prefix) and a.endswith(suffix))
        return SimpleNamespace(text=whole[len(prefix) : len(whole) - len(suffix)] if len(lengths) == 1 else "")

    monkeypatch.setattr(LanguageModel, "infill", known)
    monkeypatch.setattr(spans, "LONGEST", 6)
    thinking = Item(({"role": "user", "content": "?"}, {"role": "assistant", "content": "x"}), "complete", think=True)
    results = measure_spans(random_lm, [*items, thinking])
    assert len(results) == 4
    rows = summary(results)
    assert list(rows) == ["complete", "write", "all"]
    assert (rows["all"]["count"], rows["all"]["told"].share, rows["all"]["left_to_right"].share) == (4, 1.0, 0.0)
    with pytest.raises(ValueError, match="text alone"):
        measure_spans(random_lm, [thinking])


def test_the_command_prints_shares(
    random_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(language_model, "load", lambda *_: random_lm)
    arguments = ["dgemma", "eval-spans", "python", "sudoku", "--count", "1", "--level", "complete", "--steps", "2"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    header, _, level, whole = capsys.readouterr().out.splitlines()
    assert not ended.value.code
    assert header == "| level | items | told | found | left to right |"
    assert level.startswith("| complete | 1 | ")
    assert whole.startswith("| all | 1 | ")


@pytest.mark.skipif("sudoku" not in embedded.names(), reason="the Sudoku model is not in this checkout")
def test_a_model_that_knows_its_task_restores_spans() -> None:
    items = tasks.items(tasks.get("sudoku"), 2, 0, held_out=True, level="45-56")
    assert all(result.told for result in measure_spans(dgemma.load("sudoku", "cpu"), items))
