"""Sudoku as data: puzzles with one solution, forms that stay Sudokus, tokens as the shipped files give them."""

from pathlib import Path

import numpy as np
import pytest
import torch

import dgemma
from dgemma import embedded
from dgemma.embedded.sudoku import lines, rules
from dgemma.model.network import DiffusionGemma
from dgemma.text.chat import ChatTemplate
from dgemma.text.tokenizer import Tokenizer
from dgemma.train.recipes import sudoku
from dgemma.train.recipes.sudoku_data import Bases, draw, fingerprints, make_bases, puzzles


@pytest.fixture(scope="module")
def bases() -> Bases:
    return make_bases(12, seed=5)


@pytest.mark.parametrize("givens", [30, 45])
def test_every_form_of_a_puzzle_has_one_solution(bases: Bases, givens: int) -> None:
    puzzle, solution = puzzles(bases, np.full(len(bases), givens), np.random.default_rng(givens))
    for asked, answer in zip(puzzle.tolist(), solution.tolist(), strict=True):
        assert sum(d > 0 for d in asked) == givens
        assert list(rules.solutions(asked)) == [tuple(answer)]


def test_fingerprints_survive_symmetries_and_tell_grids_apart(bases: Bases) -> None:
    _, other = puzzles(bases, np.full(len(bases), 81), np.random.default_rng(1))
    assert not np.array_equal(other, bases.solution)
    assert fingerprints(Bases(other, bases.removal)) == fingerprints(bases)
    assert len(set(fingerprints(bases))) == len(bases)


def test_drawn_batches_keep_to_the_givens(bases: Bases) -> None:
    puzzle, solution = next(draw(bases, 64, (36, 40), seed=0))
    counts = (puzzle > 0).sum(1)
    assert counts.min() >= 36
    assert counts.max() <= 40
    assert len(np.unique(solution, axis=0)) == 64


def test_bases_are_made_once(tmp_path: Path) -> None:
    made = sudoku.load_bases(tmp_path / "bases.npz", 3, seed=9)
    again = sudoku.load_bases(tmp_path / "bases.npz", 99, seed=1)
    assert np.array_equal(made.solution, again.solution)
    assert np.array_equal(made.removal, again.removal)


def test_an_exported_run_loads_and_answers(bases: Bases, tmp_path: Path) -> None:
    model = DiffusionGemma(sudoku.config(layers=2, hidden=32)).init_weights(0)
    torch.save({"average": model.state_dict()}, tmp_path / "state.pt")
    sudoku.export(tmp_path, tmp_path / "model")
    lm = dgemma.load(tmp_path / "model")
    assert lm.defaults == sudoku.DECODING
    puzzle, _ = puzzles(bases, np.full(len(bases), 40), np.random.default_rng(0))
    text = lines(tuple(puzzle[0].tolist()))
    assert lm.tokens(text) == sudoku.tokens(puzzle, puzzle)[0][0].tolist()
    assert len(lm.generate(text, max_denoising_steps=1).tokens) <= sudoku.CANVAS


@pytest.mark.skipif("sudoku" not in embedded.names(), reason="the Sudoku model is not in this checkout")
def test_training_tokens_are_those_of_the_shipped_template_and_tokenizer(bases: Bases) -> None:
    directory = embedded.directory("sudoku")
    assert directory is not None
    tokenizer, template = Tokenizer.from_directory(directory), ChatTemplate.from_directory(directory)
    assert template is not None
    puzzle, solution = puzzles(bases, np.full(len(bases), 40), np.random.default_rng(0))
    prompt, answer = sudoku.tokens(puzzle, solution)
    for i in range(len(bases)):
        text = lines(tuple(puzzle[i].tolist()))
        assert prompt[i].tolist() == tokenizer.encode(template.render([{"role": "user", "content": text}]))
        assert answer[i].tolist() == tokenizer.encode(lines(tuple(solution[i].tolist())) + "<turn|>")
