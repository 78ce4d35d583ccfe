"""Images and video at the terminal: `run`, `chat`, and `chat` with a server."""

import json
from pathlib import Path

import pytest

import dgemma
from dgemma.checkpoints.save import save_model
from tests.media.test_images import noise, saved
from tests.media.test_prompt import text, user
from tests.media.test_video import clip
from tests.random_models import PARTS, seeing_lm
from tests.serve.conftest import serving
from tests.terminal.test_cli import dgemma_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that sees, two images and a clip."""
    folder = tmp_path_factory.mktemp("seeing")
    lm = seeing_lm()
    save_model(lm.model, folder / "model", lm.defaults)
    lm.tokenizer.backend.save(str(folder / "model" / "tokenizer.json"))
    (folder / "model" / "chat_template.jinja").write_text(PARTS, "utf-8")
    for seed, name in enumerate(("a.png", "b.png")):
        (folder / name).write_bytes(saved(noise(60, 40, seed)))
    (folder / "clip.mkv").write_bytes(clip([i / 2 for i in range(5)]))
    (folder / "bad.png").write_bytes(b"no image")
    return folder


def test_run_shows_files_before_the_prompt(folder: Path) -> None:
    files = ("--image", folder / "a.png", "--image", folder / "b.png", "--video", folder / "clip.mkv")
    trace = folder / "answer.trace"
    done = dgemma_run(
        *("run", folder / "model", "-p", "the cat", *files, "--json", "--seed", "3", "-n", "20"),
        *("--video-frames", "2", "--image-tokens", "140", "--trace", trace),
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    lm = dgemma.load(folder / "model")
    shown = [{"type": "image", "image": folder / "a.png"}, {"type": "image", "image": folder / "b.png"}]
    asked = user(*shown, {"type": "video", "video": folder / "clip.mkv"}, text("the cat"))
    mine = lm.generate(asked, seed=3, max_new_tokens=20, media={"video_frames": 2, "image_tokens": 140})
    assert (answer["tokens"], answer["prompt_tokens"]) == (mine.tokens, mine.prompt_tokens)
    assert trace.stat().st_size > 100


@pytest.mark.parametrize(
    ("flags", "code", "told"),
    [
        (["--image", "nowhere.png"], 2, "there is no image file nowhere.png"),
        (["--image", "{}/bad.png"], 1, "bad.png is not an image of a known format"),
        (["--image-tokens", "140"], 2, "--image-tokens has no effect without --image"),
        (["--image", "{}/a.png", "--video-frames", "3"], 2, "--video-frames has no effect without --video"),
        (["--image", "{}/a.png", "--image-tokens", "99"], 1, "image_tokens must be one of 70, 140"),
        (["--image", "{}/a.png", "--image-tokens", "0"], 2, "image_tokens must be a whole number in 1"),
    ],
)
def test_a_wrong_call_is_one_line(folder: Path, flags: list[str], code: int, told: str) -> None:
    done = dgemma_run("run", folder / "model", "-p", "the", *(flag.format(folder) for flag in flags))
    assert done.returncode == code
    assert told in done.stderr
    assert done.stderr.count("\n") == 1


def test_chat_here_and_with_a_server_says_the_same(folder: Path) -> None:
    lines = f"the cat\n/image {folder / 'b.png'}\nand the dog\n/video '{folder / 'clip.mkv'}'\nsang\n"
    flags = ("--image", folder / "a.png", "--seed", "3", "-n", "12", "--video-frames", "1")
    here = dgemma_run("chat", folder / "model", *flags, stdin=lines)
    assert here.returncode == 0, here.stderr
    with serving(dgemma.load(folder / "model")) as site:
        there = dgemma_run("chat", "--url", site.url, *flags, stdin=lines)
    assert there.returncode == 0, there.stderr
    assert there.stdout == here.stdout
    assert here.stdout.strip()
    blind = dgemma_run("chat", folder / "model", "--seed", "3", "-n", "12", stdin="the cat\nand the dog\nsang\n")
    assert blind.stdout != here.stdout


def test_a_file_that_is_not_there_is_told(folder: Path) -> None:
    done = dgemma_run("chat", folder / "model", stdin="/image nowhere.png\nthe cat\n")
    assert done.returncode == 1
    assert "there is no image file nowhere.png" in done.stderr
