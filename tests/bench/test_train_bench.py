"""`dgemma bench train` end to end on the small shape. No figure is asserted that depends on the machine's speed."""

import json
import math

import pytest
import torch
from typer.testing import CliRunner

from dgemma.bench import decode, harness, train
from dgemma.bench.cli import app, show_training
from dgemma.bench.harness import Spread
from dgemma.bench.shapes import SHAPES

SMALL = ("train", "--shape", "small", "--batch", "2", "--steps", "1", "--threads", "1", "--json")


def bench(*flags: str) -> tuple[dict, str]:
    done = CliRunner().invoke(app, [*SMALL, *flags])
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def check_figures(result: dict, names: list[str]) -> None:
    assert list(result["sides"]) == names
    assert list(result["ratios"]) == names[1:]
    for side in result["sides"].values():
        for spread in (side["step"], side["examples_per_second"]):
            assert 0 < spread["least"] <= spread["median"] <= spread["most"]
        assert side["examples_per_second"]["most"] == pytest.approx(2 / side["step"]["least"])
        assert math.isfinite(side["loss"])
        assert side["norm"] > 0
        assert side["peak_bytes"] is None or side["peak_bytes"] > 50 << 20


def options(**changes: object) -> dict:
    threads = torch.get_num_threads()
    given = {"shape": "small", "batch": 3, "canvases": 2, "causal": True, "device": "cpu", "threads": threads}
    return given | changes


def test_both_sides_start_from_the_same_loss_and_gradient():
    pytest.importorskip("transformers", reason="transformers, the other side, is not installed")
    result, _ = bench("--repeats", "1")
    check_figures(result, ["dgemma", "transformers", "transformers, one cache"])
    assert result["agree"] is True
    assert (result["batch"], result["canvases"], result["causal"], result["steps"]) == (2, 2, True, 1)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("canvases", [1, 3])
def test_the_sides_learn_the_same(causal, canvases, tmp_path):
    """Later losses depend on every gradient, those through the cached keys and values too, and on the optimiser.

    The prompts are longer than the sliding window, which only some of the cache's tokens are within.
    """
    pytest.importorskip("transformers", reason="transformers, the other side, is not installed")
    assert SHAPES["small"].prompt > SHAPES["small"].config.sliding_window
    decode.write_weights(SHAPES["small"], "float32", tmp_path)
    given = options(causal=causal, canvases=canvases)
    kinds = (train.Ours, train.Transformers, train.TransformersCached)
    ours, *others = (kind(str(tmp_path), **given) for kind in kinds)
    before = ours.run.model.layers[0].router.proj.weight.clone()
    losses = []
    for _ in range(3):
        loss, norm = ours.step()
        for theirs in others:
            assert theirs.step() == pytest.approx((loss, norm), rel=1e-5)
        losses.append(loss)
    assert losses == sorted(losses, reverse=True)
    assert torch.equal(ours.run.model.layers[0].router.proj.weight, before)


class Fake:
    """A side of which every step takes the same time."""

    def __init__(self, name: str, asked: list, loss: float, seconds: float):
        self.name, self.asked, self.loss, self.seconds = name, asked, loss, seconds

    def __enter__(self):
        return self

    def __exit__(self, *exception: object) -> None:
        self.asked.append((self.name, "closed"))

    def ask(self, question: str, count: int = 1):
        self.asked.append((self.name, question))
        return {"step": [self.loss, 1.0], "steps": self.seconds * count, "peak": None}[question]


@pytest.mark.parametrize(("loss", "agree"), [(6.0003, True), (6.003, False), (float("nan"), False)])
def test_turns_are_taken_and_disagreement_is_told(loss, agree, monkeypatch):
    asked: list[tuple[str, str]] = []
    made = {
        decode.OURS: Fake("a", asked, 6.0, 0.5),
        decode.THEIRS: Fake("b", asked, 6.0, 1.0),
        train.CACHED: Fake("c", asked, loss, 0.75),
        train.TUNED: Fake("d", asked, 6.0, 0.5),
    }
    monkeypatch.setattr(harness.util, "find_spec", lambda name: name)
    monkeypatch.setattr(harness.metadata, "version", lambda name: "1")
    monkeypatch.setattr(train, "_open", lambda name, options: made[name])
    result = train.run("small", batch=4, repeats=2, steps=3, threads=1, tuned=True)
    assert result.agree is agree
    assert [r.median for r in result.ratios.values()] == [2.0, 1.5, 1.0]
    assert result.sides[decode.OURS].examples_per_second == Spread(8.0, 8.0, 8.0)
    turns = [(side, "step") for side in "abcd"] + [(side, "steps") for side in "abcd"] * 2
    assert asked == [*turns, *((side, "peak") for side in "abcd"), *((side, "closed") for side in "dcba")]


def test_both_sides_learn_in_bf16(tmp_path):
    """Each rounds in its own way, and ours has masters; yet they start from one loss, and both get on."""
    pytest.importorskip("transformers", reason="transformers, the other side, is not installed")
    decode.write_weights(SHAPES["small"], "bfloat16", tmp_path)
    ours, theirs = (
        [side.step()[0] for _ in range(3)]
        for side in (kind(str(tmp_path), **options()) for kind in (train.Ours, train.Transformers))
    )
    assert ours == pytest.approx(theirs, rel=2e-2)
    assert ours[2] < ours[0]
    assert theirs[2] < theirs[0]


def test_half_of_the_canvases_are_conditioned_and_noise_differs(tmp_path):
    decode.write_weights(SHAPES["small"], "float32", tmp_path)
    side = train.Ours(str(tmp_path), **options())
    assert side.drawn.conditioned.tolist() == [True, False] * 3
    assert torch.equal(side.clean[0], side.clean[1])
    assert not torch.equal(side.drawn.noised[0], side.drawn.noised[1])


def test_without_transformers_this_project_is_measured_alone(monkeypatch):
    monkeypatch.setattr(harness.util, "find_spec", lambda name: None)
    monkeypatch.setattr(train, "_open", lambda name, options: Fake(name, [], 6.0, 0.5))
    result, told = bench("--no-causal")
    assert "transformers is not installed" in told
    check_figures(result, ["dgemma"])
    assert result["agree"] is None
    assert result["causal"] is False


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--shape", "huge"], ["shape 'huge'", "mid, small, train"]),
        (["--batch", "0"], ["batch must be at least 1, not 0"]),
        (["--canvases", "-1"], ["canvases must be at least 1, not -1"]),
        (["--steps", "0"], ["steps must be at least 1, not 0"]),
    ],
)
def test_bad_values_are_named(flags, words):
    done = CliRunner().invoke(app, ["train", *flags])
    assert done.exit_code == 2
    assert done.stdout == ""
    assert all(word in done.stderr for word in words)


def test_the_table_names_what_it_shows(capsys):
    second = Spread(1.0, 0.5, 2.0)
    side = train.Measured(second, second, 3 << 20, 6.25, 4.5)
    sides = {decode.OURS: side, decode.THEIRS: side}
    ratios = {decode.THEIRS: Spread(2.5, 2.25, 2.75)}
    told = ("train", "f32", 16, 2, True, 1, 5, 3)
    show_training(train.Result(*told, "a machine", {"torch": "2"}, sides, ratios, False))
    shown = capsys.readouterr().out
    for word in ("1000 (500 … 2000)", "6.25000", "2.50 (2.25 … 2.75)", "a machine; torch 2", "first steps agree: no"):
        assert word in shown
