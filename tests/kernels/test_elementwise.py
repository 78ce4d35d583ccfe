"""Norm and gate in C beside their plain twins, with their gradients."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dgemma.config import FULL, ModelConfig
from dgemma.kernels import elementwise, native
from dgemma.model import experts, layers
from dgemma.model.experts import Experts

SHAPES = [(7, 5), (3, 4, 32), (200, 128), (130, 2816)]
DTYPES = [torch.float32, torch.bfloat16]
BOUND = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def _built() -> None:
    if native.library() is None:
        pytest.skip("there was no compiler when this was installed")


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def results(f: Callable[..., Tensor], gradient: Tensor, *leaves: Tensor | None) -> list[Tensor]:
    """What f gives, and the gradients of its arguments; the same without a gradient being asked for."""
    asked = [leaf if leaf is None else leaf.detach().requires_grad_() for leaf in leaves]
    y = f(*asked)
    y.backward(gradient)
    with torch.no_grad():
        assert torch.equal(y, f(*leaves))
    return [y.detach(), *(leaf.grad for leaf in asked if leaf is not None and leaf.grad is not None)]


def compare(
    monkeypatch: pytest.MonkeyPatch, f: Callable[..., Tensor], gradient: Tensor, *leaves: Tensor | None
) -> None:
    found = results(f, gradient, *leaves)
    with monkeypatch.context() as patch:
        patch.setattr(native, "library", lambda: None)
        expected = results(f, gradient, *leaves)
    assert len(found) == len(expected)
    for mine, plain in zip(found, expected, strict=True):
        assert mine.dtype == plain.dtype
        assert (mine - plain).abs().max() < BOUND[mine.dtype] * plain.abs().max()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [True, False])
def test_norms(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dtype: torch.dtype, scale: bool) -> None:
    weight = (random(shape[-1], seed=1).abs() + 0.5).to(dtype) if scale else None
    x, gradient = (3 * random(*shape, seed=2)).to(dtype), random(*shape, seed=3).to(dtype)
    assert elementwise.fits_norm(x, weight)
    compare(monkeypatch, lambda x, w: layers.rms_norm(x, w, 1e-6), gradient, x, weight)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gates(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    both = (5 * random(*shape[:-1], 2 * shape[-1], seed=1)).to(dtype)
    both[..., 0] *= 40  # far beyond where gelu is 0 or x
    gradient = random(*shape, seed=2).to(dtype)
    halves = both.chunk(2, dim=-1)
    assert elementwise.fits_gate(*halves) == (len(shape) == 2), "halves of a matrix, or whole tensors"
    compare(monkeypatch, lambda both: layers.gated(*both.chunk(2, dim=-1)), gradient, both)
    compare(monkeypatch, layers.gated, gradient, *(half.contiguous() for half in halves))


def test_gradients_do_not_depend_on_the_number_of_threads() -> None:
    x, weight = random(1000, 64, seed=1), random(64, seed=2)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(results(lambda x, w: layers.rms_norm(x, w, 1e-6), random(1000, 64, seed=3), x, weight))
    for other in found[1:]:
        assert all(torch.equal(mine, first) for mine, first in zip(other, found[0], strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 2, 8), (300, 4, 128), (2, 1, 3000)], ids=str)
def test_rotations(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, angles = random(*shape, seed=1).to(dtype), 9 * random(shape[0], 1, shape[2] // 2, seed=2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    assert elementwise.fits_inference(x, cos, sin)
    assert not elementwise.fits_inference(x.requires_grad_(), cos, sin)
    with torch.no_grad():
        found = layers.rotate(x, cos, sin)
        monkeypatch.setattr(native, "library", lambda: None)
        plain = layers.rotate(x, cos, sin)
    assert (found - plain).abs().max() < BOUND[dtype] * plain.abs().max()


@pytest.mark.parametrize("shape", [(3, 1), (2, 5, 31), (40, 512), (3, 2, 1000)], ids=str)
@pytest.mark.parametrize("spread", [1, 300])
def test_softmax(shape: tuple[int, ...], spread: int) -> None:
    """With hidden scores, and some so far below the top that nothing is left of them."""
    scores = spread * random(*shape, seed=1)
    scores[..., : shape[-1] // 3] = float("-inf")
    plain = scores.double().softmax(-1)
    found = elementwise.softmax_(scores.clone())
    assert (found - plain).abs().max() < 1e-6
    assert (found.sum(-1) - 1).abs().max() < 1e-5
    assert not found[..., : shape[-1] // 3].any()
    nonzero = found[found != 0]
    assert (nonzero >= torch.finfo(torch.float32).tiny).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "k", "size"), [(3, 1, 5), (200, 4, 768), (4, 8, 3000)])
def test_sums_of_experts(monkeypatch: pytest.MonkeyPatch, tokens: int, k: int, size: int, dtype: torch.dtype) -> None:
    config = ModelConfig(50, size, 8, 6, 9, k, 2, 1, 8, 1, 8, (FULL,), 4)
    modules = Experts(config).to(dtype).requires_grad_(False)
    for weight in modules.parameters():
        weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    weights, chosen = random(tokens, 9, seed=2).softmax(-1).topk(k)
    x = random(tokens, size, seed=3).to(dtype)
    found = modules(x, weights, chosen)
    monkeypatch.setattr(elementwise, "fits_inference", lambda *tensors: False)
    plain = modules(x, weights, chosen)
    assert found.dtype == plain.dtype
    assert (found - plain).abs().max() < BOUND[dtype] * plain.abs().max()


def test_experts_in_one_call_are_those_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does in bfloat16, with gradients; some experts get no token."""
    config = ModelConfig(50, 64, 8, 24, 9, 2, 2, 1, 8, 1, 8, (FULL,), 4)
    modules = Experts(config).bfloat16()
    for weight in modules.parameters():
        torch.nn.init.normal_(weight, 0, 0.1, generator=torch.Generator().manual_seed(1))
    weights, chosen = random(20, 9, seed=2)[:, :7].softmax(-1).topk(2)
    found = []
    for together in (False, True):
        monkeypatch.setattr(experts, "fits_grouped", lambda *tensors, together=together: together)
        x = random(20, 64, seed=3).bfloat16().requires_grad_()
        y = modules(x, weights, chosen)
        y.backward(random(20, 64, seed=4).bfloat16())
        found.append([y, x.grad, *(weight.grad for weight in modules.parameters())])
        modules.zero_grad()
    for together, apart in zip(*found, strict=True):
        assert (together - apart).abs().max() < BOUND[torch.bfloat16] * apart.abs().max()


def test_empty_rows_are_no_error() -> None:
    for x in (torch.empty(0, 8), torch.empty(0, 3, 8)):
        assert layers.rms_norm(x, torch.ones(8), 1e-6).shape == x.shape
        assert layers.gated(x, x).shape == x.shape
