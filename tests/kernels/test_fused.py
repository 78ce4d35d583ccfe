"""Norm, gate and rotation in Triton beside their plain twins, with gradients: in the interpreter, or on a GPU."""

import importlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

BOUND = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DTYPES = [torch.float32, torch.float16]  # the interpreter rounds bfloat16 in its own way
DEVICES = ["interpreter", pytest.param("cuda", marks=[pytest.mark.gpu])]


def kernel(name: str, *arguments: Any, **more: Any) -> Any:
    return getattr(importlib.import_module("dgemma.kernels.fused"), name)(*arguments, **more)


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Callable[..., Any]]:
    """`kernel` in a process of its own: Triton interprets all or nothing, from its import on."""
    with pytest.MonkeyPatch.context() as patch, ProcessPoolExecutor(1, get_context("spawn")) as pool:
        patch.setenv("TRITON_INTERPRET", "1")
        pool.submit(int).result()  # starts the process
        patch.undo()
        yield lambda *arguments, **more: pool.submit(kernel, *arguments, **more).result()


@pytest.fixture(params=DEVICES)
def call(request: pytest.FixtureRequest, interpreted: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel of CPU tensors, on the device asked for."""
    if request.param == "interpreter":
        return interpreted
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    there = lambda x: x.cuda() if isinstance(x, Tensor) else x  # noqa: E731
    back = lambda x: x.cpu() if isinstance(x, Tensor) else x and tuple(map(back, x))  # noqa: E731
    return lambda name, *arguments, **more: back(kernel(name, *map(there, arguments), **more))


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found.double() - expected).abs().max() < BOUND[found.dtype] * expected.abs().max()


@pytest.mark.parametrize("shape", [(7, 5), (3, 4, 32), (3000, 16), (2, 2816)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [True, False])
def test_norms(call: Callable[..., Any], shape: tuple[int, ...], dtype: torch.dtype, scale: bool) -> None:
    weight = (random(shape[-1], seed=1).abs() + 0.5).to(dtype) if scale else None
    x, gradient = 3 * random(*shape, seed=2, dtype=dtype), random(*shape, seed=3, dtype=dtype)
    wide = x.double().requires_grad_()
    wide_weight = torch.ones(shape[-1]).double() if weight is None else weight.double()
    wide_weight.requires_grad_()
    expected = F.rms_norm(wide, shape[-1:], wide_weight, 1e-6)
    expected.backward(gradient.double())
    y, factor = call("rms_norm", x, weight, 1e-6)
    assert y.dtype == dtype
    close(y, expected.detach())
    to_x, to_weight = call("rms_norm_back", x, gradient, weight, factor)
    close(to_x, wide.grad)
    if weight is None:
        assert to_weight is None
    else:
        assert to_weight.dtype == torch.float32
        close(to_weight, wide_weight.grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("apart", [True, False])
def test_gates(call: Callable[..., Any], dtype: torch.dtype, apart: bool) -> None:
    both = 5 * random(70, 2 * 33, seed=1, dtype=dtype)
    both[:, 0] *= 40  # far beyond where gelu is 0 or x
    gate, up = both.chunk(2, dim=-1) if apart else (half.contiguous() for half in both.chunk(2, dim=-1))
    gradient = random(70, 33, seed=2, dtype=dtype)
    wide = [half.double().requires_grad_() for half in (gate, up)]
    expected = F.gelu(wide[0], approximate="tanh") * wide[1]
    expected.backward(gradient.double())
    close(call("gated", gate, up), expected.detach())
    for found, leaf in zip(call("gated_back", gate, up, gradient), wide, strict=True):
        close(found, leaf.grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 2, 8), (300, 4, 32)], ids=str)
def test_rotations(call: Callable[..., Any], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, angles = random(*shape, seed=1, dtype=dtype), 9 * random(shape[0], 1, shape[2] // 2, seed=2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    first, second = x.double().chunk(2, dim=-1)
    c, s = cos.double(), sin.double()
    y = call("rotate", x, cos, sin)
    close(y, torch.cat((first * c - second * s, second * c + first * s), dim=-1))
    close(call("rotate", y, cos, sin, back=True), x.double())


def test_nothing_is_no_error(call: Callable[..., Any]) -> None:
    assert call("rms_norm", torch.empty(0, 8), torch.ones(8), 1e-6)[0].shape == (0, 8)
    to_weight = call("rms_norm_back", torch.empty(0, 8), torch.empty(0, 8), torch.ones(8), torch.empty(0))[1]
    assert torch.equal(to_weight, torch.zeros(8))
    assert call("gated", torch.empty(0, 8), torch.empty(0, 8)).shape == (0, 8)
