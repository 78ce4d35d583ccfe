"""`dgemma train` as a user runs it: a file in, an adapter or a checkpoint out, and errors that name what is wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import dgemma
from dgemma import embedded
from dgemma.cli import merge
from dgemma.train.options import RECIPES, Recipe, TrainOptions
from dgemma.train.run import run

SMALL = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "canvas_length": 16}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "num_global_key_value_heads": 2}
SIZES = {**SMALL, **HEADS, "global_head_dim": 16}


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dgemma", "train", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that speaks the chat format, of random weights but for two steps."""
    recipe = Recipe("tiny", {"prose:facts": 1.0}, scratch=True, config=SIZES, options=TrainOptions(steps=2, batch=2))
    return run(recipe, tmp_path_factory.mktemp("base"), "cpu")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    lines = [json.dumps({"prompt": f"Say {n}.", "response": f"{n} it is."}) for n in range(20)]
    lines.insert(3, "{not json")
    lines.insert(7, json.dumps({"messages": [{"role": "user", "content": "no answer"}]}))
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "data.jsonl"


def loss(directory: Path) -> list[float]:
    lines = (directory / "log.jsonl").read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


def test_a_file_makes_an_adapter_that_loads(base: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = command(
        *("--model", str(base), "--data", str(data), "--lora", "8", "--out", str(out), "--steps", "40"),
        *("--learning-rate", "0.01", "--warmup", "5", "--png", "--tensorboard"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(out / "adapter")
    assert "line 4: not JSON" in done.stderr
    assert "line 8: messages: there is none of the role 'assistant'" in done.stderr
    assert "2 bad lines were left out" in done.stderr
    assert "step 40/40" in done.stderr
    assert loss(out)[-1] < loss(out)[0]
    assert (out / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert list((out / "tensorboard").iterdir())
    assert json.loads((out / "adapter" / "adapter_config.json").read_text())["r"] == 8
    lm = dgemma.load(out / "adapter", "cpu")
    assert lm.generate("Say 3.", max_new_tokens=16).tokens
    plain = dgemma.load(base, "cpu").model.state_dict()
    moved = {name for name, tensor in lm.model.state_dict().items() if not torch.equal(tensor, plain[name])}
    assert any("experts" in name for name in moved)
    assert not any("router" in name or "embed" in name or "norm" in name for name in moved)

    merge(str(out / "adapter"), tmp_path / "merged")
    merged = dgemma.load(tmp_path / "merged", "cpu")
    assert all(torch.equal(tensor, lm.model.state_dict()[name]) for name, tensor in merged.model.state_dict().items())
    assert merged.render([{"role": "user", "content": "Hi"}]) == lm.render([{"role": "user", "content": "Hi"}])

    # An adapter is a model like any other: training goes on from it, and what comes out is whole.
    recipe = Recipe(str(out / "adapter"), {str(data): 1.0}, options=TrainOptions(steps=1))
    further = dgemma.load(run(recipe, tmp_path / "further", "cpu"), "cpu")
    assert further.render([{"role": "user", "content": "Hi"}]) == lm.render([{"role": "user", "content": "Hi"}])


def test_all_weights_but_the_routers_are_trained(base: Path, data: Path, tmp_path: Path) -> None:
    recipe = Recipe(str(base), {str(data): 1.0}, options=TrainOptions(steps=2, learning_rate=0.01))
    result = run(recipe, tmp_path / "run", "cpu")
    before, after = (dgemma.load(path, "cpu").model.state_dict() for path in (base, result))
    same = {name for name, tensor in before.items() if torch.equal(tensor, after[name])}
    assert any("router" in name for name in same)
    assert all("router" in name or "scalar" in name for name in same)


def test_bfloat16_is_trained_and_stays_bfloat16(base: Path, data: Path, tmp_path: Path) -> None:
    recipe = Recipe(str(base), {str(data): 1.0}, options=TrainOptions(steps=3, learning_rate=0.01, checkpointing=True))
    result = run(recipe, tmp_path / "run", "cpu", "bfloat16")
    assert dgemma.load(result, "cpu").model.dtype == torch.bfloat16


def test_evaluations_are_logged(tmp_path: Path) -> None:
    recipe = Recipe(
        *("tiny", {"prose:facts": 1.0, "arithmetic:add": 0.5}, ("prose:facts", "arithmetic:add")),
        scratch=True,
        config=SIZES,
        options=TrainOptions(steps=2, batch=2, eval_items=3, ema=0.9),
    )
    run(recipe, tmp_path, "cpu")
    (figures,) = [e["eval"] for e in map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines()) if "eval" in e]
    levels = ("prose facts", "arithmetic add")
    names = {f"{figure}/{level}" for figure in ("exact", "valid", "steps") for level in levels}
    assert set(figures) == names


def test_sigint_saves_and_the_same_command_goes_on(base: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    call = ["--model", str(base), "--data", str(data), "--lora", "4", "--out", str(out), "--save-every", "100000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dgemma", "train", *call, "--steps", "100000"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 60
    while not (out / "log.jsonl").exists() or not loss(out):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    reached = torch.load(out / "state.pt", weights_only=True)["step"]
    assert reached >= 10
    done = command(*call, "--steps", str(reached + 5))
    assert done.returncode == 0, done.stderr
    assert torch.load(out / "state.pt", weights_only=True)["step"] == reached + 5


def test_a_file_is_evaluated_too(base: Path, data: Path, tmp_path: Path) -> None:
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text(json.dumps({"prompt": "Say 99.", "response": "99 it is."}) + "\n")
    recipe = Recipe(str(base), {str(data): 1.0}, (str(held_out),), options=TrainOptions(steps=1, batch=2))
    run(recipe, tmp_path / "run", "cpu")
    entries = map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines())
    (figures,) = [entry["eval"] for entry in entries if "eval" in entry]
    assert set(figures) == {"exact/held-out", "valid/held-out", "steps/held-out"}


def test_an_earlier_run_with_other_options_is_not_continued(base: Path, data: Path, tmp_path: Path) -> None:
    recipe = Recipe(str(base), {str(data): 1.0}, options=TrainOptions(steps=1))
    run(recipe, tmp_path / "run", "cpu")
    with pytest.raises(ValueError, match=r"holds a run with learning_rate = 0\.00015, not 0\.5"):
        run(recipe.with_options(learning_rate=0.5), tmp_path / "run", "cpu")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "give a recipe, or --model and --data"),
        (["--model", "tiny"], 2, "give a recipe, or --model and --data"),
        (["no-such.toml"], 1, "no-such.toml"),
        (["--model", "x", "--data", "y", "--optimizer", "sgd"], 2, "optimizer must be adam or muon, not 'sgd'"),
        (["--model", "x", "--data", "y", "--conditioning", "2"], 2, "conditioning must lie in 0 … 1, not 2"),
        (["--model", "BASE", "--data", "nothing.jsonl"], 1, "nothing.jsonl"),
        (["--model", "BASE", "--data", "chess"], 1, "there is no task 'chess'"),
        (["--model", "BASE", "--data", "prose:epic"], 1, "task prose has no level 'epic'"),
        (["--model", "BASE", "--data", "EMPTY"], 1, "there is no example in it"),
        (["--model", "BASE", "--data", "prose", "--lora", "0"], 1, "rank must be at least 1, not 0"),
    ],
)
def test_errors_are_one_line(base: Path, tmp_path: Path, arguments: list[str], code: int, message: str) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    places = {"BASE": str(base), "EMPTY": str(tmp_path / "empty.jsonl")}
    done = command(*(places.get(a, a) for a in arguments), "--out", str(tmp_path / "run"))
    assert done.returncode == code
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_recipe_file_is_read_and_flags_override_it(base: Path, data: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    lora = '[lora]\nrank = 2\nparts = ["attention"]\n'
    path.write_text(f'model = "{base}"\n[tasks]\n"{data}" = 1\n{lora}[train]\nsteps = 9\n')
    done = command(str(path), "--steps", "1", "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    stored = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert stored["step"] == 1
    assert {name.split(".")[2] for name in stored["weights"]} == {"self_attn"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('model = "tiny"\n', "tasks is missing"),
        ('model = "tiny"\ncolour = 1\n[tasks]\n', "colour is not known; a recipe holds"),
        ('model = "tiny"\n[tasks]\n[train]\nstep = 3\n', r"train\.step is not an option"),
        ('model = "tiny"\n[tasks]\n[train]\nsteps = "x"\n', "steps must be int, not 'x'"),
        ("model = ", r"mine\.toml: "),
    ],
)
def test_a_wrong_recipe_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        Recipe.from_toml(tmp_path / "mine.toml")


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.toml")))
def test_shipped_recipes_are_sound(name: str) -> None:
    recipe = Recipe.from_toml(name)
    assert recipe.options.steps > 0
    assert (embedded.HERE / recipe.model / "config.json").exists()
