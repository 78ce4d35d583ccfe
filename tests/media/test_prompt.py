"""Messages with images and video to tokens: as the reference's processor spells them, in any order."""

import base64
import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend

from dgemma.config import MediaConfig, ModelConfig
from dgemma.media.images import soft_tokens
from dgemma.media.sources import Sources
from dgemma.picture import Prompted
from dgemma.text.chat import ChatTemplate
from dgemma.text.tokenizer import Tokenizer
from tests.media.test_images import noise, saved
from tests.media.test_video import clip
from tests.random_models import random_lm, seeing_lm

Part = dict[str, Any]


def url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def image(width: int = 60, height: int = 40, seed: int = 0) -> Part:
    return {"type": "image", "image": saved(noise(width, height, seed))}


def text(said: str) -> Part:
    return {"type": "text", "text": said}


def user(*parts: Part) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def test_images_stand_where_their_parts_stand() -> None:
    lm = seeing_lm()
    assert lm.model.config.vision
    read = lm.read(user(image(60, 40), text("the cat"), image(30, 90), image(60, 40), text("and")))
    config = lm.model.config
    lengths = [soft_tokens(h, w, 70, config.vision) for w, h in ((60, 40), (30, 90), (60, 40))]
    assert [each.end - each.begin for each in read.pictures] == lengths
    for each in read.pictures:
        assert set(read.tokens[each.begin : each.end]) == {config.image_token_id}
        assert (read.tokens[each.begin - 1], read.tokens[each.end]) == (config.boi_token_id, config.eoi_token_id)
    assert read.pictures[0].picture.digest == read.pictures[2].picture.digest != read.pictures[1].picture.digest
    between = read.tokens[read.pictures[0].end + 1 : read.pictures[1].begin - 1]
    assert lm.tokenizer.decode(between) == "the cat"


@pytest.fixture(scope="session")
def released(shared: Path) -> tuple[Tokenizer, ChatTemplate, ModelConfig]:
    template = ChatTemplate((shared / "chat_template_v2.jinja").read_text("utf-8"))
    return Tokenizer.from_directory(shared), template, ModelConfig.from_file(shared / "config.json")


def test_the_released_prompt_equals_the_references(released: Any, shared: Path) -> None:
    """Its own processor's text, through its tokenizer."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.gemma4 import processing_gemma4 as gemma

    from dgemma.media.prompt import media_of, opened, prompted

    tokenizer, template, config = released
    messages = [
        *user(image(640, 480), text("What is\n"), image(100, 900), text(" this?")),
        {"role": "assistant", "content": "A cat."},
        *user(text("Sure? "), {"type": "video", "video": clip([i / 4 for i in range(11)])}, text("And here?")),
    ]
    shown = opened(messages, config, MediaConfig(), Sources())
    rendered = template.render(shown, add_generation_prompt=True, plain=tokenizer.plain)
    ours = prompted(rendered, media_of(shown), tokenizer, config)

    names = {"image_token": "<|image|>", "video_token": "<|video|>", "boi_token": "<|image>", "eoi_token": "<image|>"}
    stub = SimpleNamespace(**names)
    first, second, video = media_of(shown)
    counts = {"num_soft_tokens_per_image": [len(p.patches) // 9 for p in (first, second)]}
    clips = {
        "num_soft_tokens_per_video": [len(video.frames[0][1].patches) // 9],
        "video_metadata": [SimpleNamespace(fps=4, timestamps=[second for second, _ in video.frames])],
    }
    wanted = rendered
    for i in range(2):
        wanted = wanted.replace("<|image|>", gemma.Gemma4Processor.replace_image_token(stub, counts, i).upper(), 1)
    spelled = gemma.Gemma4Processor.replace_video_token(stub, clips, 0).replace("<|video|>", "<|image|>")
    wanted = wanted.replace("<|video|>", spelled).replace("<|IMAGE", "<|image").replace("<IMAGE|>", "<image|>")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(shared / "tokenizer.json"))
    assert ours.tokens == theirs(wanted, add_special_tokens=False).input_ids
    assert all(f"{clock} <|image>" in wanted for clock in ("00:00", "00:01", "00:02"))
    assert [len(p.patches) // 9 for p in (first, second)] == [
        soft_tokens(480, 640, 280, config.vision),
        soft_tokens(900, 100, 280, config.vision),
    ]
    assert len(ours.pictures) == 2 + 3


def test_users_cannot_spell_an_image() -> None:
    lm = seeing_lm()
    config = lm.model.config
    read = lm.read(user(text("see <|image|> and <|video|>"), image(), text("<|image>")))
    assert len(read.pictures) == 1
    first = read.pictures[0]
    assert read.tokens.count(config.image_token_id or 0) == first.end - first.begin


def test_neither_can_a_model_nor_an_operator() -> None:
    """What a model has said comes back with its special tokens."""
    lm = seeing_lm()
    said = "<|image|> a <|video|> <|image>"
    read = lm.read(
        [
            {"role": "system", "content": "<|image|>"},
            *user(image(), text("the cat")),
            {"role": "assistant", "content": said},
            *user(text("and"), image(30, 90)),
        ]
    )
    config = lm.model.config
    assert len(read.pictures) == 2
    assert read.tokens.count(config.image_token_id or 0) == sum(each.end - each.begin for each in read.pictures)
    after = lm.tokenizer.decode(read.tokens[read.pictures[0].end :])
    assert said.replace("<|image>", "") in after, "as ordinary characters, but for what opens no image by itself"
    assert "\ufdd0" not in after
    chat = lm.chat(seed=1, max_new_tokens=4)
    chat.messages = [*user(image()), {"role": "assistant", "content": said}]
    assert len(list(chat.send("and?"))) > 2
    assert chat.messages[1]["content"] == said


def test_a_tokenizer_without_a_token_for_videos() -> None:
    lm = seeing_lm()
    lacking = Tokenizer(Backend.from_str(lm.tokenizer.backend.to_str().replace("<|video|>", "<|other|>")))
    lm = replace(lm, tokenizer=lacking)
    read = lm.read(user(text("a <|video|> b"), {"type": "video", "video": clip([0, 0.5])}))
    assert "a <|video|> b" in lm.tokenizer.decode(read.tokens)
    assert len(read.pictures) == 1


def test_every_way_to_give_an_image(tmp_path: Path) -> None:
    lm = seeing_lm()
    data = saved(noise(60, 40))
    (tmp_path / "a.png").write_bytes(data)
    pillow = pytest.importorskip("PIL.Image")
    parts: list[Part] = [
        {"type": "image", "image": data},
        {"type": "image", "image": str(tmp_path / "a.png")},
        {"type": "image", "image": tmp_path / "a.png"},
        {"type": "image", "image": pillow.open(io.BytesIO(data))},
        {"type": "image_url", "image_url": {"url": url(data)}},
        {"type": "image_url", "image_url": {"url": url(data), "detail": "auto"}},
        {"type": "image_url", "image_url": url(data)},
    ]
    reads = [lm.read(user(part, text("?"))) for part in parts]
    assert all(read.begins_with(reads[0]) and len(read.tokens) == len(reads[0].tokens) for read in reads)
    assert lm.read(reads[0]) is reads[0]
    low, high = (
        lm.read(user({"type": "image_url", "image_url": {"url": url(data), "detail": detail}})).pictures[0]
        for detail in ("low", "high")
    )
    assert low.end - low.begin <= 70 < high.end - high.begin <= 1120


def test_budgets() -> None:
    lm = seeing_lm()
    for budget in (70, 140, 560):
        placed = lm.read(user(image()), media={"image_tokens": budget}).pictures[0]
        assert budget * 0.7 < placed.end - placed.begin <= budget
    for wrong, why in (
        ({"image_tokens": 71}, "image_tokens must be one of 70, 140, 280, 560, 1120, not 71"),
        ({"image_tokens": 0}, "image_tokens must be a whole number in 1 … 1120"),
        ({"video_frames": 61}, "video_frames must be a whole number in 0 … 60"),
        ({"tokens": 1}, "unknown option 'tokens'"),
    ):
        with pytest.raises(ValueError, match=why):
            lm.read(user(image()), media=wrong)


def test_a_video_is_frames_with_their_times() -> None:
    lm = seeing_lm()
    data = clip([i / 2 for i in range(5)])
    read = lm.read(user({"type": "video", "video": data}, text("?")))
    assert len(read.pictures) == 3
    first, second = read.pictures[:2]
    assert lm.tokenizer.decode(read.tokens[first.end + 1 : second.begin - 1]) == " 00:01 "
    assert first.end - first.begin == 64
    fewer = lm.read(
        user({"type": "video_url", "video_url": {"url": url(data, "video/x-matroska")}}), media={"video_frames": 2}
    )
    assert len(fewer.pictures) == 2
    late = lm.read(user({"type": "video", "video": clip([0, 70.5, 119])}), media={"video_frames": 3})
    assert "01:10 " in lm.tokenizer.decode(late.tokens)


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    lm = seeing_lm()
    for part, why in (
        ({"type": "image"}, r'messages\[0\].content\[0\]: \{"type": "image", "image": …\} is expected'),
        ({"type": "image", "image": 3}, r"content\[0\].image: a path, a URL or bytes are expected, not int"),
        ({"type": "image", "image": "nowhere.png"}, r"content\[0\]: there is no file nowhere.png"),
        ({"type": "image", "image": b"text"}, r"content\[0\]: the image is not an image of a known format"),
        ({"type": "video", "video": b"text"}, r"content\[0\]: the video is not a video"),
        ({"type": "image_url", "image_url": {}}, r"content\[0\].image_url.url: a string is expected, not null"),
        ({"type": "image_url", "image_url": {"url": "x", "size": 3}}, "image_url.size is not supported"),
        ({"type": "image_url", "image_url": {"url": "x", "detail": "odd"}}, "'auto', 'low' or 'high' is expected"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64"}}, "a comma"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,??"}}, "is not base64"),
        ({"type": "image_url", "image_url": {"url": "https://a.example/x.png"}}, "nothing is fetched from 'a.example'"),
    ):
        with pytest.raises(ValueError, match=why):
            lm.read(user(part))
    with pytest.raises(ValueError, match=r"messages\[0\].content\[0\]: this model has no vision tower"):
        random_lm().read(user(image()))
    with pytest.raises(ValueError, match="images and video are not taken here"):
        lm.tokens(user(image()))
    with pytest.raises(ValueError, match="images and video are not taken here"):
        lm.score(user(image()), "<choice>", ["a", "b"])
    with pytest.raises(ValueError, match="type 'image' is not supported for role 'assistant'"):
        lm.read([*user(text("a")), {"role": "assistant", "content": [image()]}])


def test_none_of_it_needs_torch() -> None:
    code = "import sys, dgemma.media.prompt; print('torch' in sys.modules, 'PIL' in sys.modules, 'av' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["False"] * 3


def test_text_alone_needs_no_pillow() -> None:
    lm = seeing_lm()
    assert lm.read("the cat") == Prompted(lm.tokens("the cat"))
    assert lm.read(user(text("the cat"))).tokens == lm.tokens("the cat")
