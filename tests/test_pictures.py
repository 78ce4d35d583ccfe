"""LanguageModel with images and video: generate, chat, scores, and what a machine without pillow is told."""

import subprocess
import sys
from typing import Any

import pytest
import torch

from dgemma import Finished, Prefilled
from dgemma.language_model import LanguageModel
from dgemma.picture import Prompted
from tests.media.test_images import noise, saved
from tests.media.test_prompt import image, text, user
from tests.media.test_video import clip
from tests.random_models import seeing_lm


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return seeing_lm()


def test_what_is_shown_matters(lm: LanguageModel) -> None:
    asked = [user(image(seed=seed), text("the cat")) for seed in (0, 1, 0)]
    one, other, again = (lm.generate(each, seed=3).tokens for each in asked)
    assert one == again != other
    assert lm.generate(user(text("the cat"), image()), seed=3).tokens != one, "order matters"


def test_a_read_prompt_says_the_same(lm: LanguageModel) -> None:
    asked = user(image(), text("the cat"))
    read = lm.read(asked)
    assert isinstance(read, Prompted)
    answer = lm.generate(read, seed=3)
    assert answer.tokens == lm.generate(asked, seed=3).tokens
    assert answer.prompt_tokens == len(read.tokens)
    for prompt, why in ((read, "has been read already"), ("the cat", "no image or video")):
        with pytest.raises(ValueError, match=f"image_tokens has no effect: .*{why}"):
            lm.generate(prompt, media={"image_tokens": 70})


def test_every_mode_sees(lm: LanguageModel) -> None:
    shown = [user(image(seed=seed), text("the cat")) for seed in (0, 1)]
    for options in ({"best_of": 2}, {"autoregressive": True}, {"constraint": "[a-z ]{1,9}"}):
        answers = [lm.generate(each, seed=1, **options).tokens for each in shown]
        assert answers[0] != answers[1], options
    logs = [lm.log_probabilities(each, "the dog") for each in shown]
    assert logs[0] != logs[1]


def test_best_of_and_autoregressive_equal_the_whole_encoding(lm: LanguageModel) -> None:
    """Their prompts are encoded but for the last token, with the pictures in the same places."""
    read = lm.read(user(image(), text("the cat")))
    cache = lm.model.new_cache()
    with torch.inference_mode():
        logits = lm.model.encode([torch.tensor(read.tokens)], cache, logits=True, pictures=[read.pictures])
    assert logits is not None
    assert lm.generate(read, autoregressive=True, max_new_tokens=1).tokens == [int(logits[0][-1].argmax())]


def test_a_conversation_keeps_what_it_was_shown(lm: LanguageModel) -> None:
    chat = lm.chat(seed=2, max_new_tokens=8)
    calls: list[int] = []
    assert lm.model.vision
    hook = lm.model.vision.register_forward_hook(lambda *_: calls.append(1))
    first = list(chat.send([image(), text("the cat")]))
    second = list(chat.send("and?"))
    third = list(chat.send([text("and"), image(seed=4)]))
    hook.remove()
    assert len(calls) == 2, "the tower runs once a picture"
    prefilled = [next(e for e in events if isinstance(e, Prefilled)) for events in (first, second, third)]
    assert prefilled[1].cached > prefilled[0].cached > 70

    # The same as from nothing.
    *_, last = third
    assert isinstance(last, Finished)
    again = lm.generate(chat.messages[:-1], seed=2, max_new_tokens=8)
    assert again.tokens == last.tokens
    assert again.prompt_tokens == last.prompt_tokens


def test_a_video_is_seen(lm: LanguageModel) -> None:
    clips = [clip([i / 2 for i in range(5)]), clip([0, 0.4, 1.7, 1.8, 2])]
    answers = [lm.generate(user({"type": "video", "video": each}, text("the"))).tokens for each in clips]
    assert answers[0] != answers[1]
    fewer = lm.generate(user({"type": "video", "video": clips[0]}, text("the")), media={"video_frames": 1})
    assert fewer.prompt_tokens < 100


def test_a_prompt_too_long_is_told(lm: LanguageModel) -> None:
    many: list[dict[str, Any]] = [image(seed=i) for i in range(7)]
    with pytest.raises(ValueError, match=r"need \d+ positions; the model has 8000"):
        lm.generate(user(*many, text("the cat " * 300)), media={"image_tokens": 1120})
    with pytest.raises(ValueError, match=r"content\[7\]: up to here images and videos take \d+ tokens"):
        lm.generate(user(*many, *many), media={"image_tokens": 1120})


def test_without_pillow_or_av_the_extra_is_named() -> None:
    code = (
        "import sys\nfor name in ('PIL', 'av'): sys.modules[name] = None\n"
        "import dgemma.language_model\n"  # needs neither
        "from dgemma.media.images import open_image\nfrom dgemma.media.video import frames\n"
        "for call in (open_image, frames):\n"
        "    try:\n        call(b'', 'it')\n    except ValueError as error:\n        print(error)\n"
    )
    told = subprocess.check_output([sys.executable, "-c", code], text=True).splitlines()
    assert len(told) == 2
    assert all("pip install 'dgemma[media]'" in line for line in told)


def test_equal_files_are_one_picture(lm: LanguageModel) -> None:
    png, bmp = saved(noise(50, 30)), saved(noise(50, 30), "BMP")
    read = lm.read(user({"type": "image", "image": png}, {"type": "image", "image": bmp}))
    assert read.pictures[0].picture.digest == read.pictures[1].picture.digest
