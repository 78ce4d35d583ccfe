"""Training on examples with pictures: the sequences of inference, the same losses, and a tower that moves if told."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import dgemma
from dgemma.checkpoints.save import save_model
from dgemma.evals import conversations, tasks
from dgemma.evals.measure import measure
from dgemma.language_model import LanguageModel
from dgemma.media.images import FilePicture
from dgemma.train.data import Conversation, examples, load_jsonl
from dgemma.train.objective import Batch, corrupt, denoise_logits, diffusion_loss, encode
from dgemma.train.options import Recipe, TrainOptions
from dgemma.train.run import run
from dgemma.train.sources import assemble
from tests.media.test_images import noise, saved
from tests.media.test_prompt import image, text, user
from tests.random_models import PARTS, seeing_lm


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return seeing_lm()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Good lines that name images beside the file, one image a line or two, and three bad lines."""
    for seed, name in enumerate(("a.png", "b.png")):
        (tmp_path / name).write_bytes(saved(noise(60, 40, seed)))
    (tmp_path / "bad.png").write_bytes(saved(noise(60, 40))[:300])
    shown = lambda name: {"type": "image", "image": name}  # noqa: E731
    answer = {"role": "assistant", "content": "a cat"}
    lines: list[dict[str, Any]] = [
        {"messages": [*user(shown("a.png"), text("the cat")), answer]},
        {"messages": [*user(shown("gone.png")), answer]},
        {"messages": [*user(shown("b.png"), text("the"), shown("a.png")), answer, *user(text("and")), answer]},
        {"messages": [*user(shown("bad.png")), answer]},
        {"prompt": "the cat", "response": "sat"},
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_file_names_images_beside_it(lm: LanguageModel, file: Path) -> None:
    found, bad = load_jsonl(file, lm.tokenizer, lm.template, 512, 16, lm.model.config)
    assert [line.number for line in bad] == [2, 4]
    assert "gone.png" in bad[0].reason
    assert "bad.png is a damaged image" in bad[1].reason
    assert [len(example.pictures) for example in found] == [1, 2, 0]
    assert all(isinstance(each.picture, FilePicture) for example in found for each in example.pictures)
    read = lm.read(user({"type": "image", "image": file.parent / "a.png"}, text("the cat")))
    first = found[0]
    assert first.tokens[: first.targets[0].start].tolist() == read.tokens
    assert first.pictures[0].picture.digest == read.pictures[0].picture.digest
    assert len(found[1].targets) == 2, "the second turn continues the first"
    (item, *_) = conversations.read_items(write(file.parent / "one.jsonl", file.read_text().splitlines()[0]))
    assert lm.read(list(item.question)).begins_with(read)
    with pytest.raises(ValueError, match="images and video are not taken here"):
        examples(Conversation(tuple(user(image()))), lm.tokenizer, lm.template, 512, 16)


def write(path: Path, line: str) -> Path:
    path.write_text(line)
    return path


def test_a_picture_that_changes_under_a_run_is_told(lm: LanguageModel, file: Path) -> None:
    found, _ = load_jsonl(file, lm.tokenizer, lm.template, 512, 16, lm.model.config)
    (file.parent / "a.png").write_bytes(saved(noise(60, 40, 9)))
    with pytest.raises(ValueError, match=r"a.png has changed"):
        lm.model.see([found[0].pictures[0].picture])


def batch_of(lm: LanguageModel, file: Path) -> Batch:
    found, _ = load_jsonl(file, lm.tokenizer, lm.template, 512, 16, lm.model.config)
    return assemble(found, 2, 16, 1, random.Random(0))


@torch.no_grad()
def test_what_training_computes_is_what_inference_computes(lm: LanguageModel, file: Path) -> None:
    batch = batch_of(lm, file)
    tape, causal = encode(lm.model, batch, causal=True)
    soft = torch.zeros(*batch.clean.shape, lm.model.config.hidden_size)
    logits = denoise_logits(lm.model, batch.clean, tape, batch.start, soft)
    for row in range(len(batch.clean)):
        tokens, shown = batch.before(row)
        cache = lm.model.new_cache()
        lm.model.encode([tokens], cache, pictures=[shown])
        torch.testing.assert_close(
            logits[row], lm.model.denoise(batch.clean[row][None], cache)[0], rtol=1e-3, atol=1e-3
        )
    assert causal is not None
    said = []
    for owner, start, stop in batch.answers:
        example = batch.examples[owner]
        found = lm.model.encode([example], lm.model.new_cache(), logits=True, pictures=[batch.pictures[owner]])
        assert found is not None
        logs = found[0].log_softmax(-1)[torch.arange(start - 1, stop - 1), example[start:stop]]
        said.append(-logs)
    torch.testing.assert_close(causal, torch.cat(said), rtol=1e-3, atol=1e-3)


def test_the_loss_depends_on_what_is_shown_and_reaches_the_tower(lm: LanguageModel, file: Path) -> None:
    batch = batch_of(lm, file)
    drawn = corrupt(batch.clean, lm.model.config.vocab_size, torch.Generator().manual_seed(0), conditioning=0.0)
    assert lm.model.vision
    tower = list(lm.model.vision.parameters())
    for parameter in tower:
        parameter.requires_grad_(True)
    try:
        loss, _ = diffusion_loss(lm.model, batch, drawn)
        loss.mean().backward()
        assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in tower)
    finally:
        for parameter in tower:
            parameter.grad = None
            parameter.requires_grad_(False)
    with torch.no_grad():
        swapped = Batch(batch.examples, batch.owner, batch.start, batch.clean, batch.answers, [(), *batch.pictures[1:]])
        assert not torch.equal(diffusion_loss(lm.model, swapped, drawn)[0][:2], loss.detach()[:2])
        assert torch.allclose(diffusion_loss(lm.model, swapped, drawn)[0][2:], loss.detach()[2:], atol=1e-4)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("seeing")
    lm = seeing_lm()
    save_model(lm.model, directory, lm.defaults)
    lm.tokenizer.backend.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(PARTS, "utf-8")
    return directory


def moved(before: LanguageModel, after: Path) -> set[str]:
    """Parts of the network whose weights are no longer what they were."""
    old, new = before.model.state_dict(), dgemma.load(after, "cpu").model.state_dict()
    return {name.partition(".")[0] for name in old if not torch.equal(old[name], new[name])}


def test_a_run_on_images(directory: Path, file: Path, tmp_path: Path) -> None:
    """From a model: the tower stays unless it is told; from random weights it is made and trained; by rollout too."""
    lm, tasks_ = dgemma.load(directory, "cpu"), {str(file): 1.0, "digits:one": 1.0}
    options = TrainOptions(steps=2, batch=3, warmup=0, limit=512)
    result = run(Recipe(str(directory), tasks_, options=options), tmp_path / "a", "cpu")
    assert moved(lm, result) >= {"layers", "embed_tokens"}
    assert "vision" not in moved(lm, result)
    told = TrainOptions(steps=2, batch=3, warmup=0, limit=512, vision=True, rollout=0.5, optimizer="muon", workers=1)
    assert "vision" in moved(lm, run(Recipe(str(directory), tasks_, options=told), tmp_path / "b", "cpu"))
    made = run(Recipe(str(directory), tasks_, scratch=True, options=told), tmp_path / "c", "cpu")
    assert dgemma.load(made, "cpu").model.vision is not None
    adapter = run(Recipe(str(directory), tasks_, lora={"rank": 2}, options=options), tmp_path / "d", "cpu")
    assert dgemma.load(adapter, "cpu").generate(user(image(), text("the"))).tokens
    for recipe, why in (
        (Recipe(str(directory), tasks_, lora={"rank": 2}, options=told), "no effect with lora"),
        (Recipe("sudoku", {"sudoku": 1.0}, options=told), "no image tower"),
    ):
        with pytest.raises(ValueError, match=why):
            run(recipe, tmp_path / "e", "cpu")


def test_digits_in_a_picture(lm: LanguageModel) -> None:
    task = tasks.get("digits")
    for level in task.LEVELS:
        items = tasks.items(task, 6, 0, held_out=True, level=level)
        assert items == tasks.items(task, 6, 0, held_out=True, level=level)
        assert len({json.dumps(item.question) for item in items}) == 6
        for item in items:
            said = item.answer["content"]
            assert task.check(item, answer(said)).exact
            wrong = " ".join(str((int(d) + 1) % 10) for d in said.split())
            score = task.check(item, answer(wrong))
            assert (score.exact, score.valid, score.parts["digits"]) == (False, True, 0)
            assert not task.check(item, answer(f"It says {said}")).valid
            assert len(lm.read(list(item.question)).pictures) == 1
    results = measure(lm, tasks.items(task, 3, 0, held_out=True), task, constrain=True, max_new_tokens=20)
    assert all(result.score.valid for result in results)


def answer(said: str) -> Any:
    return type("Said", (), {"text": said})()
