"""The training loss: against the reference's modules, and against itself one canvas at a time."""

import dataclasses
import random

import pytest
import torch
import torch.nn.functional as F

from dgemma.checkpoints.names import released_name, stored_name
from dgemma.model import attention
from dgemma.train import objective
from dgemma.train.memory import checkpoint_layers
from dgemma.train.objective import Batch, Corruption, corrupt, diffusion_loss
from tests.parity.reference import make_reference, random_config


def _case(seed: int):
    """Two examples: one turn of three canvases, and two turns of one and two; five of the six canvases are drawn."""
    rng = random.Random(seed)
    config = random_config(rng)
    ours, theirs = make_reference(config, seed)
    generator = torch.Generator().manual_seed(seed)
    c = config.canvas_length
    lengths = [9 + 3 * c, 5 + c + 6 + 2 * c]
    examples = [torch.randint(config.vocab_size, (length,), generator=generator) for length in lengths]
    second = 5 + c + 6
    owner, start = [0, 0, 1, 1, 1], [9, 9 + 2 * c, 5, second, second + c]
    clean = torch.stack([examples[o][s : s + c] for o, s in zip(owner, start, strict=True)])
    clean[1, c // 2 :] = config.eos_token_id[0]  # the last canvas of a turn is filled beyond its end
    answers = [(0, 9, 9 + 2 * c + c // 2), (1, 5, 5 + c - 1), (1, second, second + 2 * c)]
    drawn = corrupt(clean, config.vocab_size, generator, infill=0.4)
    conditioned = torch.tensor([True, False, False, True, True])
    return (
        ours,
        theirs,
        Batch(examples, owner, start, clean, answers),
        dataclasses.replace(drawn, conditioned=conditioned),
    )


def _reference_logits(theirs, batch: Batch, drawn: Corruption, row: int) -> torch.Tensor:
    """One canvas alone through transformers' own modules."""
    prefix = batch.examples[batch.owner[row]][: batch.start[row]]
    inputs = {"input_ids": prefix[None], "decoder_input_ids": drawn.noised[row : row + 1]}
    previous = None
    if drawn.conditioned[row]:
        with torch.no_grad():
            previous = theirs(**inputs).logits
        one_hot = torch.full_like(previous, -1e4).scatter_(-1, batch.clean[row : row + 1, :, None], 1e4)
        previous = torch.where(drawn.pinned[row][None, :, None], one_hot, previous)
    return theirs(**inputs, self_conditioning_logits=previous).logits[0]


def _reference_losses(theirs, batch: Batch, drawn: Corruption) -> tuple[torch.Tensor, torch.Tensor]:
    rows = [
        F.cross_entropy(_reference_logits(theirs, batch, drawn, row), batch.clean[row], reduction="none")
        for row in range(len(batch.clean))
    ]
    causal = []
    for example, start, stop in batch.answers:
        out = theirs.model.encoder(input_ids=batch.examples[example][None])
        logits = theirs.final_logit_softcapping * torch.tanh(
            theirs.lm_head(out.last_hidden_state[0]).float() / theirs.final_logit_softcapping
        )
        tokens = batch.examples[example][start:stop]
        causal.append(F.cross_entropy(logits[start - 1 : stop - 1], tokens, reduction="none"))
    return torch.stack(rows), torch.cat(causal)


# The random network of seed 0 amplifies rounding to 2e-5.
@pytest.mark.parametrize("seed", range(1, 6))
def test_loss_and_gradients_equal_the_references(seed: int) -> None:
    ours, theirs, batch, drawn = _case(seed)
    loss, causal = diffusion_loss(ours, batch, drawn, causal=True)
    expected, expected_causal = _reference_losses(theirs, batch, drawn)
    for got, wanted in ((loss, expected), (causal, expected_causal)):
        torch.testing.assert_close(got.mean(), wanted.mean(), atol=1e-5, rtol=1e-6)
        torch.testing.assert_close(got, wanted, atol=3e-5 * wanted.mean().item(), rtol=3e-5)

    (loss.mean() + causal.mean()).backward()
    (expected.mean() + expected_causal.mean()).backward()
    grads = {released_name(name): p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    total, differences = torch.nn.utils.get_total_norm(grads.values()), []
    for name, parameter in ours.named_parameters():
        if not name.startswith("vision"):
            grad = grads[stored_name(name)]
            assert grad.norm() > 0
            differences.append((parameter.grad - grad).norm())
            assert differences[-1] < 3e-4 * grad.norm() + 3e-7 * total, name
    assert torch.stack(differences).norm() < 3e-5 * total


@pytest.mark.parametrize("seed", range(1, 6))
@pytest.mark.parametrize("step", [5, 64])
@pytest.mark.parametrize("fused", [False, True])
def test_lengths_filled_up_as_on_a_gpu_change_nothing(seed: int, step: int, fused: bool, monkeypatch) -> None:
    """One mask for many lengths: the same losses and gradients as one span for each."""
    found = []
    for bucket in (1, step):
        monkeypatch.setitem(objective.BUCKET, "cpu", bucket)
        monkeypatch.setattr(attention, "fits_fused", lambda *_, bucket=bucket: fused and bucket > 1)
        ours, _, batch, drawn = _case(seed)
        attended = _count_spans(ours)
        loss, causal = diffusion_loss(ours, batch, drawn, causal=True)
        (loss.mean() + causal.mean()).backward()
        found.append((loss, causal, {name: p.grad for name, p in ours.named_parameters()}, attended))
    (loss, causal, grads, exact), (filled, filled_causal, filled_grads, few) = found
    assert step == 5 or max(few) < max(exact)
    torch.testing.assert_close(filled, loss, atol=3e-5, rtol=3e-5)
    torch.testing.assert_close(filled_causal, causal, atol=3e-5, rtol=3e-5)
    total = torch.nn.utils.get_total_norm(grad for grad in grads.values() if grad is not None)
    for name, grad in grads.items():
        if grad is not None:
            assert (filled_grads[name] - grad).norm() < 3e-5 * total, name


def _count_spans(model) -> list[int]:
    counts, stack = [], model.stack
    model.stack = lambda x, spans, *rest, **more: counts.append(len(spans)) or stack(x, spans, *rest, **more)
    return counts


def test_without_the_causal_loss_nothing_else_changes() -> None:
    ours, _, batch, drawn = _case(5)
    with_causal, _ = diffusion_loss(ours, batch, drawn, causal=True)
    without, nothing = diffusion_loss(ours, batch, drawn)
    assert nothing is None
    torch.testing.assert_close(without, with_causal, atol=1e-6, rtol=1e-6)


def test_several_canvases_at_once_equal_one_by_one() -> None:
    ours, _, batch, drawn = _case(7)
    together, _ = diffusion_loss(ours, batch, drawn)
    for row in range(len(batch.clean)):
        one = slice(row, row + 1)
        single = Batch([batch.examples[batch.owner[row]]], [0], [batch.start[row]], batch.clean[one])
        alone, _ = diffusion_loss(
            ours, single, Corruption(drawn.noised[one], drawn.level[one], drawn.conditioned[one], drawn.pinned[one])
        )
        torch.testing.assert_close(together[one], alone, atol=1e-5, rtol=1e-5)


def test_a_canvas_depends_on_its_prefix_and_itself_alone() -> None:
    """A later canvas or turn must not leak into an earlier one."""
    ours, _, batch, drawn = _case(3)
    before, _ = diffusion_loss(ours, batch, drawn, causal=True)
    changed = [example.clone() for example in batch.examples]
    for row, (owner, start) in enumerate(zip(batch.owner, batch.start, strict=True)):
        changed = [example.clone() for example in batch.examples]
        changed[owner][start:] = (changed[owner][start:] + 1) % ours.config.vocab_size
        after, _ = diffusion_loss(ours, dataclasses.replace(batch, examples=changed), drawn, causal=True)
        torch.testing.assert_close(after[row], before[row], atol=1e-5, rtol=1e-5)


def test_leave_one_out_brings_the_noised_token_in_by_bayes() -> None:
    """Against Bayes' rule written out: p(clean | noised) is prior times the chance of the corruption, normalised."""
    ours, theirs, batch, drawn = _case(2)
    drawn = dataclasses.replace(drawn, conditioned=torch.zeros(5, dtype=torch.bool))
    loss, _ = diffusion_loss(ours, batch, drawn, leave_one_out=True)
    size = ours.config.vocab_size
    for row in range(5):
        prior = _reference_logits(theirs, batch, drawn, row).double().softmax(-1)
        t = float(drawn.level[row])
        likelihood = torch.full_like(prior, t / size)
        likelihood.scatter_add_(-1, drawn.noised[row][:, None], torch.full_like(likelihood[:, :1], 1 - t))
        posterior = prior * likelihood / (prior * likelihood).sum(-1, keepdim=True)
        expected = -posterior.gather(-1, batch.clean[row][:, None]).log().squeeze(-1)
        torch.testing.assert_close(loss[row].double(), expected, atol=1e-4, rtol=1e-4)


def test_corruption_replaces_the_share_it_draws() -> None:
    clean = torch.zeros(2000, 50, dtype=torch.int64)
    drawn = corrupt(clean, 1000, torch.Generator().manual_seed(0))
    share = (drawn.noised != 0).float().mean(1)
    assert (share - drawn.level * 0.999).abs().mean() < 0.05
    assert 0.48 < drawn.level.mean() < 0.52
    assert 0.45 < drawn.conditioned.float().mean() < 0.55
    assert drawn.noised.max() > 990
    assert not drawn.pinned.any()


def test_infill_leaves_one_gap_and_pins_the_rest() -> None:
    clean = torch.zeros(500, 20, dtype=torch.int64)
    drawn = corrupt(clean, 1000, torch.Generator().manual_seed(0), infill=0.5)
    assert not drawn.noised[drawn.pinned].any()
    open_ = (~drawn.pinned).int()
    begins = (open_.diff(dim=1, prepend=torch.zeros(500, 1, dtype=torch.int32)) == 1).sum(1)
    assert (begins == 1).all(), "every canvas has one gap, some from border to border"
    assert 0.4 < drawn.pinned.any(1).float().mean() < 0.5


def test_the_exponent_shifts_the_noise_levels() -> None:
    clean = torch.zeros(4000, 2, dtype=torch.int64)
    level = corrupt(clean, 10, torch.Generator().manual_seed(0), exponent=0.5).level
    assert abs(level.mean() - 2 / 3) < 0.02


@pytest.mark.parametrize("conditioned", [False, True])
def test_checkpointed_layers_give_the_same_gradients(conditioned: bool) -> None:
    ours, _, batch, drawn = _case(1)
    drawn = dataclasses.replace(drawn, conditioned=torch.full((5,), conditioned))

    def gradients() -> list[torch.Tensor]:
        ours.zero_grad()
        loss, causal = diffusion_loss(ours, batch, drawn, causal=True)
        (loss.mean() + causal.mean()).backward()
        return [p.grad.clone() for p in ours.parameters() if p.grad is not None]

    plain = gradients()
    checkpoint_layers(ours)
    for ours_grad, again in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(ours_grad, again, atol=1e-6, rtol=1e-5)
