"""The pass over the vocabulary against plain float64 formulas; proposals against a plain running sum."""

import pytest
import torch
from parity.reference import randomise
from torch import Tensor

from dgemma.config import FULL, ModelConfig
from dgemma.decoding import vocabulary
from dgemma.decoding.vocabulary import BLOCK, inverse_cdf, read
from dgemma.kernels import native
from dgemma.model.head import TiedEmbedding


def head(size: int, cap: float = 30.0, hidden: int = 12) -> TiedEmbedding:
    config = ModelConfig(size, hidden, 8, 6, 2, 1, 2, 1, 8, 1, 8, (FULL,), 4, final_logit_softcapping=cap)
    embedding = TiedEmbedding(config)
    randomise(embedding, 0)
    return embedding.requires_grad_(False)


@pytest.fixture(params=["in C", "in PyTorch"], autouse=True)
def _both_ways(request, monkeypatch):
    if request.param == "in PyTorch":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("there was no compiler when this was installed")


def padded(weights: Tensor) -> Tensor:
    size = weights.shape[1]
    return torch.nn.functional.pad(weights, (0, -size % BLOCK))


def plain(weights: Tensor, target: Tensor) -> Tensor:
    """The smallest index whose running sum in float64 exceeds the target."""
    above = weights.double().cumsum(-1) > target.double()[:, None]
    return above.int().argmax(-1)


@pytest.mark.parametrize("size", [1, 7, 511, 512, 513, 1024, 3000])
def test_inverse_cdf_is_the_plain_running_sum(size):
    """Whole numbers as weights, so that float32 sums are exact and every target has one answer."""
    generator = torch.Generator().manual_seed(size)
    weights = torch.randint(0, 4, (200, size), generator=generator).float()
    weights[:, -1] += 1
    total = weights.sum(-1)
    for target in (torch.rand(200, generator=generator) * total, (torch.rand(200) * total).floor(), total * 0):
        target = target.minimum(total - 0.5)
        assert torch.equal(inverse_cdf(padded(weights), target, size), plain(weights, target))


def test_every_token_is_drawn_as_often_as_it_weighs():
    size = 1300
    weights = torch.zeros(1, size)
    weights[0, [3, 511, 512, 1299]] = torch.tensor([1.0, 2.0, 3.0, 2.0])
    targets = torch.arange(0, 8, 0.5)
    drawn = inverse_cdf(padded(weights).expand(16, -1).contiguous(), targets, size)
    assert drawn.bincount(minlength=size)[[3, 511, 512, 1299]].tolist() == [2, 4, 6, 4]


@pytest.mark.parametrize("size", [5, 512, 700])
def test_a_target_at_or_above_the_sum_takes_the_last_token_with_a_weight(size):
    weights = torch.zeros(3, size)
    weights[:, 1], weights[:, 3] = 0.25, 0.75
    above = torch.tensor([1.0, 1.0 + 1e-6, 2.0])
    assert inverse_cdf(padded(weights), above, size).tolist() == [3, 3, 3]


def test_tokens_without_weight_are_never_drawn():
    size = 1100
    weights = torch.zeros(400, size)
    generator = torch.Generator().manual_seed(0)
    weights[:, 500:600] = torch.rand(400, 100, generator=generator) * (torch.rand(400, 100, generator=generator) > 0.7)
    weights[:, 550] = 1e-3
    u = torch.linspace(0, 1, 400)
    drawn = inverse_cdf(padded(weights), u * padded(weights).sum(-1), size)
    assert torch.all(weights[torch.arange(400), drawn] > 0)


@pytest.mark.parametrize("size", [40, 512, 1025])
@pytest.mark.parametrize("cap", [2.0, 30.0])
@pytest.mark.parametrize("tile", [1, 1 << 13, 8 << 20])
def test_read_is_the_plain_formula(monkeypatch, size, cap, tile):
    monkeypatch.setattr(vocabulary, "TILE_BYTES", tile)
    embedding = head(size, cap)
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(2, 9, 12, generator=generator)
    temperature, u = torch.tensor([0.4, 1.3]), torch.rand(2, 9, generator=generator)
    found = read(embedding, states, temperature, u)
    matrix = embedding.weight.double()
    scaled = cap * torch.tanh(states.double() @ matrix.T / cap) / temperature.double()[:, None, None]
    p = scaled.softmax(-1)
    assert torch.equal(found.best, scaled.argmax(-1))
    entropy = -(p * p.clamp_min(1e-300).log()).sum(-1)
    torch.testing.assert_close(found.entropy.double(), entropy, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(found.soft.double(), p @ matrix * 12**0.5, atol=1e-4, rtol=1e-4)
    drawn = (p.cumsum(-1) > u[..., None]).int().argmax(-1)
    running = p.cumsum(-1)
    clear = (running - u[..., None]).abs().amin(-1) > 1e-5
    assert clear.float().mean() > 0.9
    assert torch.equal(found.proposal[clear], drawn[clear])
    without = read(embedding, states, temperature, u, soft=False)
    assert without.soft is None
    assert torch.equal(without.proposal, found.proposal)


def test_read_of_certain_and_indifferent_positions():
    embedding = head(600, cap=1000.0)
    embedding.weight.zero_()
    embedding.weight[17] = 100.0
    states = torch.stack((torch.zeros(12), torch.ones(12)))[None]
    for u in (0.0, 0.5, 1 - 2**-24):
        found = read(embedding, states, torch.tensor([0.5]), torch.full((1, 2), u))
        torch.testing.assert_close(found.entropy[0], torch.tensor([600.0, 1.0]).log(), atol=1e-5, rtol=1e-6)
        assert found.best[0, 1] == found.proposal[0, 1] == 17
        assert found.proposal[0, 0] == int(u * 600)


def test_read_does_not_change_its_inputs():
    embedding = head(40)
    states, temperature, u = torch.randn(2, 3, 12), torch.tensor([0.5, 0.6]), torch.rand(2, 3)
    kept = [x.clone() for x in (states, temperature, u, embedding.weight)]
    read(embedding, states, temperature, u)
    assert all(torch.equal(a, b) for a, b in zip(kept, (states, temperature, u, embedding.weight), strict=True))
