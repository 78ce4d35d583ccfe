"""A model's own answers as data: only those that the rule accepts, none of them held out, in the training format."""

import json
import random
from pathlib import Path

import pytest

import dgemma
from dgemma.evals.tasks import Answer, Item, Score
from dgemma.train.data import load_jsonl
from dgemma.train.teacher import teach

HELD_OUT = [n for n in range(100) if Item(({"role": "user", "content": f"{n}"}, {}), "only").held_out]


class Parity:
    """Accepts whatever is said to even questions."""

    LEVELS = ("only",)

    def draw(self, rng: random.Random, level: str) -> Item:
        question = {"role": "user", "content": f"{rng.randrange(100)}"}
        return Item((question, {"role": "assistant", "content": "right"}), level)

    def check(self, item: Item, answer: Answer) -> Score:
        return Score(False, int(item.question[0]["content"]) % 2 == 0)


@pytest.fixture(scope="module")
def lm() -> dgemma.LanguageModel:
    lm = dgemma.load("sudoku", "cpu")
    object.__setattr__(lm, "task", None)  # any text may be asked
    return lm


def test_only_valid_answers_are_kept(lm: dgemma.LanguageModel, tmp_path: Path) -> None:
    told = []
    kept = teach(
        *(lm, Parity(), ("only",), 20, tmp_path / "new" / "teacher.jsonl"),
        progress=lambda asked, kept: told.append((asked, kept)),
        max_denoising_steps=1,
    )
    lines = [json.loads(line) for line in (tmp_path / "new" / "teacher.jsonl").read_text().splitlines()]
    assert len(lines) == kept
    assert told[-1] == (20, kept)
    asked = [int(line["messages"][0]["content"]) for line in lines]
    assert asked
    assert not any(n % 2 for n in asked)
    assert not set(asked) & set(HELD_OUT)
    assert all(line["messages"][-1]["content"] != "right" for line in lines), "the model's own words"
    found, bad = load_jsonl(tmp_path / "new" / "teacher.jsonl", lm.tokenizer, lm.template, 512, 90)
    assert (len(found), bad) == (kept, [])


def test_nothing_valid_is_an_error(lm: dgemma.LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Parity, "check", lambda *_: Score(False, False))
    with pytest.raises(ValueError, match="no valid answer to 2 questions"):
        teach(lm, Parity(), ("only",), 2, tmp_path / "teacher.jsonl", max_denoising_steps=1)
