"""The training loss: against the reference's modules, and against itself one canvas at a time."""

import random

import pytest
import torch
import torch.nn.functional as F

from dgemma.checkpoints.names import released_name, stored_name
from dgemma.train.objective import Corruption, corrupt, diffusion_loss
from tests.parity.reference import make_reference, random_config

PROMPT, ROWS = 9, 4


def _case(seed: int):
    config = random_config(random.Random(seed))
    ours, theirs = make_reference(config, seed)
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(config.vocab_size, (2, PROMPT), generator=generator)
    clean = torch.randint(config.vocab_size, (ROWS, config.canvas_length), generator=generator)
    drawn = corrupt(clean, config.vocab_size, generator)
    chosen = torch.tensor([True, False, False, True])
    return ours, theirs, prompt, Corruption(clean, drawn.noised, drawn.level, chosen)


def _reference_loss(theirs, prompt: torch.Tensor, drawn: Corruption) -> torch.Tensor:
    """Each canvas alone through transformers' own modules."""
    losses = []
    for row in range(ROWS):
        example = prompt[row // 2 : row // 2 + 1]
        inputs = {"input_ids": example, "decoder_input_ids": drawn.noised[row : row + 1]}
        previous = None
        if drawn.conditioned[row]:
            with torch.no_grad():
                previous = theirs(**inputs).logits
        logits = theirs(**inputs, self_conditioning_logits=previous).logits[0]
        losses.append(F.cross_entropy(logits, drawn.clean[row], reduction="none"))
    return torch.stack(losses)


@pytest.mark.parametrize("seed", range(4))
def test_loss_and_gradients_equal_the_references(seed: int) -> None:
    ours, theirs, prompt, drawn = _case(seed)
    loss, expected = diffusion_loss(ours, prompt, drawn), _reference_loss(theirs, prompt, drawn)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)

    loss.mean().backward()
    expected.mean().backward()
    wanted = {released_name(name): p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    for name, parameter in ours.named_parameters():
        if not name.startswith("vision"):
            grad = wanted[stored_name(name)]
            assert grad.abs().max() > 0
            scale = max(1.0, float(grad.abs().max()))
            torch.testing.assert_close(parameter.grad, grad, atol=1e-5 * scale, rtol=1e-4)


def test_several_canvases_of_an_example_equal_one_by_one() -> None:
    ours, _, prompt, drawn = _case(7)
    together = diffusion_loss(ours, prompt, drawn)
    for row in range(ROWS):
        one = slice(row, row + 1)
        single = Corruption(drawn.clean[one], drawn.noised[one], drawn.level[one], drawn.conditioned[one])
        alone = diffusion_loss(ours, prompt[row // 2 : row // 2 + 1], single)
        torch.testing.assert_close(together[one], alone, atol=1e-5, rtol=1e-5)


def test_corruption_replaces_the_share_it_draws() -> None:
    clean = torch.zeros(2000, 50, dtype=torch.int64)
    drawn = corrupt(clean, 1000, torch.Generator().manual_seed(0))
    share = (drawn.noised != 0).float().mean(1)
    assert (share - drawn.level * 0.999).abs().mean() < 0.05
    assert 0.48 < drawn.level.mean() < 0.52
    assert 0.45 < drawn.conditioned.float().mean() < 0.55
    assert drawn.noised.max() > 990
