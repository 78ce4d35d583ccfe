from dgemma.terminal.canvas import SPECIAL, CanvasText
from dgemma.terminal.layout import Style
from dgemma.text.tokenizer import Tokenizer

from .conftest import END, make_step


def test_a_token_that_changed_shows_it_before_its_acceptance(wide_tokenizer: Tokenizer):
    first = make_step(wide_tokenizer.encode("abcd"), 1, accepted=[True, True, False, False])
    second = make_step(wide_tokenizer.encode("axcy"), 2, accepted=[True, True, False, False])
    text = CanvasText(wide_tokenizer, ends=(END,))
    assert text.pieces(first, None) == [
        ("a", Style.ACCEPTED),
        ("b", Style.ACCEPTED),
        ("c", Style.RENOISED),
        ("d", Style.RENOISED),
    ]
    assert text.pieces(second, first) == [
        ("a", Style.ACCEPTED),
        ("x", Style.CHANGED),
        ("c", Style.RENOISED),
        ("y", Style.CHANGED),
    ]


def test_bytes_of_one_character_are_one_piece_no_surer_than_its_weakest_byte(wide_tokenizer: Tokenizer):
    tokens = [wide_tokenizer.id(f"<0x{byte:02X}>") for byte in "é".encode()]
    step = make_step([*wide_tokenizer.encode("a"), *tokens], accepted=[True, True, False])  # type: ignore[list-item]
    pieces = CanvasText(wide_tokenizer, ends=(END,)).pieces(step, None)
    assert pieces == [("a", Style.ACCEPTED), ("é", Style.RENOISED)]


def test_half_a_character_is_a_replacement_character(wide_tokenizer: Tokenizer):
    step = make_step([wide_tokenizer.id("<0xC3>"), *wide_tokenizer.encode("a")])  # type: ignore[list-item]
    assert [text for text, _ in CanvasText(wide_tokenizer, ends=(END,)).pieces(step, None)] == ["\ufffd", "a"]


def test_text_ends_at_the_first_end_token(wide_tokenizer: Tokenizer):
    end = wide_tokenizer.id("<turn|>")
    assert end is not None
    step = make_step([*wide_tokenizer.encode("ab"), end, *wide_tokenizer.encode("cd")])
    text = CanvasText(wide_tokenizer, ends=(END, end))
    assert "".join(piece for piece, _ in text.pieces(step, None)) == "ab"
    assert len(text.kept(step)) == 2


def test_other_special_tokens_are_faint_dots(wide_tokenizer: Tokenizer):
    step = make_step(wide_tokenizer.encode("<|channel>a<pad>"))
    pieces = CanvasText(wide_tokenizer, ends=(END,)).pieces(step, None)
    assert pieces == [(SPECIAL, Style.FAINT), ("a", Style.ACCEPTED), (SPECIAL, Style.FAINT)]
