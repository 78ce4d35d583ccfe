"""Edit: what is not selected stays to the last byte, whatever the weights, the canvas and the text."""

import random
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import random_lm

import dgemma
from dgemma import embedded
from dgemma.decoding.denoise import Canvas
from dgemma.edit import Edit
from dgemma.model.network import DiffusionGemma

TEXT = "the cat sat\nand the dog sang\n▁ and 漢字 👍\r\nthe bird <eos> sat\nand the cat sang and the dog sat\n"


def outside(text: str, spans: list[tuple[int, int]]) -> list[str]:
    ends = [0, *(stop for _, stop in spans)]
    starts = [*(start for start, _ in spans), len(text)]
    return [text[a:b] for a, b in zip(ends, starts, strict=True)]


@pytest.mark.parametrize("canvas", [8, 16, 40])
@pytest.mark.parametrize("noise", [1.0, 0.4])
def test_all_outside_of_the_spans_stays(canvas: int, noise: float) -> None:
    lm, rng = random_lm(canvas), random.Random(canvas)
    for seed in range(4):
        at = sorted(rng.sample(range(len(TEXT) + 1), 4))
        spans = [(at[0], at[1]), (at[2], at[3])]
        made = lm.edit(TEXT, spans, noise=noise, seed=seed)
        assert outside(made.text, made.spans) == outside(TEXT, spans)
        assert made == made_again(made, lm.edit(TEXT, spans[::-1], noise=noise, seed=seed))


def made_again(first: Edit, second: Edit) -> Edit:
    """The second edit, with the first one's seconds."""
    return Edit(second.text, second.before, second.blocks, second.spans, second.cut, first.seconds)


@settings(max_examples=25, deadline=None)
@given(st.text(min_size=1, max_size=40), st.data())
def test_any_text_keeps_what_is_not_selected(text: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(text) - 1))
    span = (start, data.draw(st.integers(start + 1, len(text))))
    made = random_lm(16).edit(text, [span], max_denoising_steps=1)
    assert outside(made.text, made.spans) == outside(text, [span])


def test_a_span_keeps_its_number_of_tokens() -> None:
    lm = random_lm(16)
    written: list[list[int]] = []
    decode = lm.tokenizer.decode
    with mock.patch.object(lm.tokenizer, "decode", lambda ids, **o: written.append(list(ids)) or decode(ids, **o)):
        lm.edit(TEXT, [(4, 7), (13, 29)])
    assert [len(ids) for ids in written] == [len(lm.tokenizer.encode(TEXT[a:b])) for a, b in ((4, 7), (13, 29))]
    assert not {i for ids in written for i in ids} & set(lm.defaults.eos_token_id)


def test_canvases_before_the_first_change_are_only_encoded_and_those_behind_the_last_not_at_all() -> None:
    lm = random_lm(8)
    text = "abcdefgh" * 8
    assert len(lm.tokenizer.encode(text)) == 64
    encoded: list[int] = []
    encode = DiffusionGemma.encode

    def count(self: DiffusionGemma, tokens: object, cache: object, **rest: object) -> object:
        encoded.append(sum(len(row) for row in tokens))  # type: ignore[attr-defined]
        return encode(self, tokens, cache, **rest)  # type: ignore[arg-type]

    with mock.patch.object(DiffusionGemma, "encode", count):
        made = lm.edit(text, [(18, 20), (33, 35)])
    assert encoded == [1 + 16, 8, 8]  # bos and two canvases; then the changed one and the pinned one behind it
    assert [steps > 0 for steps, _ in made.blocks] == [True, False, True]
    assert made.text[:18] == text[:18]
    assert outside(made.text, made.spans)[2] == text[35:]


def test_below_full_noise_the_span_starts_from_what_is_there() -> None:
    lm, started = random_lm(40), []
    begin = Canvas.begin

    def keep(*arguments: Any) -> Canvas:
        started.append(begin(*arguments))
        return started[-1]

    text, options = "a" * 36, {"max_denoising_steps": 10}
    letter = lm.tokenizer.encode("a")[0]
    with mock.patch.object(Canvas, "begin", keep):
        light, heavy, none = (lm.edit(text, [(0, 36)], noise=noise, **options) for noise in (0.2, 0.8, 1.0))
    kept = [int((canvas.given[:36] == letter).sum()) for canvas in started]
    assert kept[0] > 20 > kept[1] > kept[2]
    assert [made.blocks[0][0] <= most for made, most in ((light, 2), (heavy, 8), (none, 10))] == [True] * 3


@pytest.mark.parametrize("options", [{"noise": 0.5}, {"spans": [(5, 25)]}], ids=["all of it", "its end"])
def test_no_end_token_stands_in_the_text_however_many_there_are(options: dict[str, Any]) -> None:
    plain = random_lm(16)
    text = "the cat and the dog and t"
    lm = replace(plain, defaults=plain.defaults.with_options(eos_token_id=tuple(range(1, 281))))
    assert not set(lm.tokenizer.encode(text)) & set(lm.defaults.eos_token_id)
    written: list[int] = []
    decode = lm.tokenizer.decode
    with mock.patch.object(lm.tokenizer, "decode", lambda ids, **o: written.extend(ids) or decode(ids, **o)):
        made = lm.edit(text, **options)
    start, stop = options.get("spans", [(0, len(text))])[0]
    assert len(written) == len(lm.tokenizer.encode(text[start:stop]))
    assert not set(written) & set(lm.defaults.eos_token_id)
    assert made.text[made.spans[0][1] :] == text[stop:]
    assert not made.cut


def test_an_instruction_is_a_message_and_its_answer_the_text() -> None:
    lm = random_lm(16)
    made = lm.edit("the cat sat\n\n", instruction="Make it sing.", seed=3)
    asked = [{"role": "user", "content": "Make it sing.\n\nthe cat sat"}]
    answer = lm.generate(asked, seed=3)
    assert made.text == answer.text + "\n\n"
    assert made.cut == (answer.finish_reason == "length")
    draft = lm.generate(asked, seed=3, draft="the cat sat", noise_level=0.3)
    assert lm.edit("the cat sat", instruction="Make it sing.", noise=0.3, seed=3).text == draft.text


def test_with_an_instruction_the_spans_alone_change() -> None:
    made = random_lm(16).edit(TEXT, [(4, 7)], instruction="Another animal.")
    assert outside(made.text, made.spans) == outside(TEXT, [(4, 7)])


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {"spans": [(0, 1)]}, "empty"),
        ("abc", {}, "noise below 1"),
        ("abc", {"spans": []}, "no spans"),
        ("abc", {"spans": [(1, 4)]}, "1:4"),
        ("abc", {"spans": [(-1, 2)]}, "-1:2"),
        ("abc", {"spans": [(1, 1)]}, "1:1"),
        ("abc", {"spans": [(0, 2), (1, 3)]}, "1:3 overlaps"),
        ("abc", {"spans": [(0, 2)], "noise": 1.5}, "1.5"),
        ("abc", {"spans": [(0, 2)], "max_new_tokens": 3}, "max_new_tokens"),
        ("abc", {"instruction": "x", "prompt": "y"}, "not both"),
    ],
)
def test_wrong_calls_are_named(text: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        random_lm(16).edit(text, **options)  # type: ignore[arg-type]


def test_an_instruction_needs_a_template() -> None:
    with pytest.raises(ValueError, match="random has no chat template"):
        random_lm(16, False).edit("abc", instruction="x")


def test_a_diff_is_unified_and_says_where_a_line_end_is_missing() -> None:
    made = Edit("a\nB\x0cb\nc", "a\nb\x0cb\nc\n", [], [], False, 0.0)
    assert made.diff("f") == (
        "--- a/f\n+++ b/f\n@@ -1,3 +1,3 @@\n a\n-b\x0cb\n-c\n+B\x0cb\n+c\n\\ No newline at end of file\n"
    )
    assert Edit("a\n", "a\n", [], [], False, 0.0).diff() == ""


@pytest.mark.skipif("sudoku" not in embedded.names(), reason="the Sudoku model is not in this checkout")
def test_cells_of_a_solved_sudoku_are_found_again() -> None:
    lm = dgemma.load("sudoku", "cpu")
    puzzle = "53..7.912 6..195..8 198...567 .5.76..23 4.68.3.91 7.39.4..6 9615..284 2.74196.5 3..28.1.9"
    solution = lm.generate(puzzle).text
    wrong = "".join("1" if at % 7 == 3 and c != "\n" else c for at, c in enumerate(solution))
    spans = [(at, at + 1) for at, c in enumerate(solution) if at % 7 == 3 and c != "\n"]
    assert wrong != solution
    assert lm.edit(wrong, spans, prompt=puzzle).text == solution
