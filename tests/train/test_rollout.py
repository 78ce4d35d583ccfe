"""Canvases from the model's own denoising: what the sampler would leave, and what the loss makes of them."""

import dataclasses

import torch
import torch.nn.functional as F

from dgemma.config import GenerationConfig
from dgemma.decoding.denoise import Canvas, denoise_step
from dgemma.train import rollout
from dgemma.train.objective import corrupt, diffusion_loss
from dgemma.train.options import TrainOptions
from dgemma.train.rollout import roll_out
from tests.train.test_objective import _case


def test_rolled_out_canvases_are_the_samplers(monkeypatch) -> None:
    ours, _, batch, drawn = _case(4)
    begun = []
    begin = Canvas.begin
    monkeypatch.setattr(Canvas, "begin", lambda *a: begun.append(begin(*a)) or begun[-1])
    rolled = roll_out(ours, batch, drawn, TrainOptions(rollout=1.0), step=3)
    assert len(begun) == 5
    assert not rolled.conditioned.any()
    for row, canvas in enumerate(begun):
        # Again alone, from the same noise, behind the canvas's own prefix.
        cache = ours.new_cache()
        ours.encode([batch.examples[batch.owner[row]][: batch.start[row]]], cache)
        again = begin(ours, 0, 0, GenerationConfig(), canvas.noise)
        with torch.no_grad():
            for _ in range(canvas.steps):
                denoise_step(ours, cache, [again])
        assert torch.equal(rolled.noised[row], again.tokens)
        torch.testing.assert_close(rolled.given[row], again.soft, atol=1e-4, rtol=1e-3)
    assert 1 < max(canvas.steps for canvas in begun) <= 8


def test_canvases_of_one_place_are_taken_from_one_way(monkeypatch) -> None:
    """Each after its own number of steps; what is wanted of a way that has come to rest stays as it was drawn."""
    ours, _, batch, _ = _case(4)
    batch = dataclasses.replace(batch, owner=[0] * 6, start=[9] * 6, clean=batch.clean[:1].expand(6, -1))
    drawn = corrupt(batch.clean, ours.config.vocab_size, torch.Generator().manual_seed(1), conditioning=1.0)
    left = []
    step = rollout.denoise_step

    def resting(model, cache, canvases):
        step(model, cache, canvases)
        left.extend((canvas.tokens, canvas.soft) for canvas in canvases)
        canvases[0].still = canvases[0].steps == 4

    monkeypatch.setattr(rollout, "denoise_step", resting)
    rolled = roll_out(ours, batch, drawn, TrainOptions(rollout=1.0, rollout_steps=6), step=0)
    assert len(left) == 4
    taken = (~rolled.conditioned).nonzero().flatten().tolist()
    found = [next(n for n in range(4) if torch.equal(rolled.given[row], left[n][1].cpu())) for row in taken]
    assert sorted(found) == [0, 1, 2, 3]
    for row, n in zip(taken, found, strict=True):
        assert torch.equal(rolled.noised[row], left[n][0])
    for row in set(range(6)) - set(taken):
        assert torch.equal(rolled.noised[row], drawn.noised[row])
        assert not rolled.given[row].any()


def test_the_loss_sees_what_the_sampler_believed() -> None:
    ours, _, batch, drawn = _case(4)
    rolled = roll_out(ours, batch, drawn, TrainOptions(rollout=1.0), step=0)
    loss, _ = diffusion_loss(ours, batch, rolled)
    for row in range(5):
        cache = ours.new_cache()
        ours.encode([batch.examples[batch.owner[row]][: batch.start[row]]], cache)
        states = ours.denoise_states(rolled.noised[row : row + 1], cache, rolled.given[row : row + 1])
        logits = ours.embed_tokens.logits(states)[0]
        expected = F.cross_entropy(logits, batch.clean[row], reduction="none")
        torch.testing.assert_close(loss[row], expected, atol=1e-4, rtol=1e-5)


def test_the_share_is_kept_and_the_rest_untouched() -> None:
    ours, _, batch, drawn = _case(4)
    assert roll_out(ours, batch, drawn, TrainOptions(rollout=0.0), step=0) is drawn
    drawn = dataclasses.replace(drawn, conditioned=torch.ones(5, dtype=torch.bool))
    rolled = roll_out(ours, batch, drawn, TrainOptions(rollout=0.5), step=1)
    assert 0 < rolled.conditioned.sum() < 5
    assert torch.equal(rolled.noised[rolled.conditioned], drawn.noised[rolled.conditioned])
    again = roll_out(ours, batch, drawn, TrainOptions(rollout=0.5), step=1)
    assert torch.equal(again.noised, rolled.noised)
