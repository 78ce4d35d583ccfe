"""Twins against float64 products of dequantised weights; kernels against twins, in Triton's interpreter or on a GPU."""

import importlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from typing import Any

import pytest
import torch
from torch import Tensor

from dgemma.kernels import plain

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

COUNTS, OUTPUTS = (5, 0, 1, 19, 8), 48
LEVELS = (0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6)
CASES = ["bf16", "fp8", "int4-32", "int4-64", "int4-128", "nvfp4", "nvfp4-divided"]

Case = tuple[str, tuple[Tensor, ...], Tensor]
"""A function's name, its weight's parts, and the weight [E, O, K] in float64."""


def case(layout: str, experts: int, outputs: int, columns: int, dtype: torch.dtype, device: str = "cpu") -> Case:
    generator = torch.Generator(device).manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.rand(experts, outputs, *shape, generator=generator, device=device)

    if layout == "bf16":
        weight = random(columns).sub(0.5).to(dtype)
        return "grouped_bf16", (weight,), weight.double()
    if layout == "fp8":
        codes, scale = random(columns).sub(0.5).mul(800).to(torch.float8_e4m3fn), random(1).add(0.5).bfloat16()
        return "grouped_fp8", (codes.view(torch.uint8), scale), codes.double() * scale.double()
    digits = random(columns).mul(16).byte()
    packed = digits[..., ::2] + 16 * digits[..., 1::2]
    if layout.startswith("int4"):
        group = int(layout.removeprefix("int4-"))
        scale = random(columns // group).add(0.5).bfloat16()
        return "grouped_int4", (packed, scale), (digits.double() - 8) * scale.double().repeat_interleave(group, -1)
    # Of nearly all magnitudes that e4m3 has, from the least on.
    scale = random(columns // 16).mul(17).sub(9).exp2().to(torch.float8_e4m3fn)
    factor, divide = random(1).add(0.5), layout == "nvfp4-divided"
    levels = torch.tensor(LEVELS, dtype=torch.float64, device=device)[digits.long()]
    scales = scale.double() * (1 / factor.double() if divide else factor.double())
    weight = levels * scales.repeat_interleave(16, -1)
    return "grouped_nvfp4", (packed, scale.view(torch.uint8), factor, *[True] * divide), weight


def rows(counts: tuple[int, ...], columns: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    x = torch.randn(sum(counts), columns, generator=torch.Generator(device).manual_seed(0), device=device)
    return x.to(dtype), torch.tensor([0, *counts], device=device).cumsum(0)


def dense(x: Tensor, offsets: Tensor, weight: Tensor) -> Tensor:
    expert = torch.repeat_interleave(torch.arange(len(weight)), offsets.diff())
    return torch.einsum("nk,nok->no", x.double(), weight[expert])


def error(y: Tensor, expected: Tensor) -> float:
    """The greatest difference, relative to the root mean square."""
    return ((y.double() - expected.double()).abs().max() / expected.double().square().mean().sqrt()).item()


def a_bit_apart(y: Tensor, expected: Tensor, slack: float) -> bool:
    """Whether at most the last bit differs; `slack`, in root mean squares, is for sums that nearly cancel."""
    near = torch.finfo(y.dtype).eps * expected.float().abs() + slack * expected.float().square().mean().sqrt()
    return bool(((y.float() - expected.float()).abs() <= near).all())


@pytest.mark.parametrize("layout", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_twins_are_products_with_the_dequantised_weight(layout: str, dtype: torch.dtype) -> None:
    name, parts, weight = case(layout, len(COUNTS), OUTPUTS, 128, dtype)
    x, offsets = rows(COUNTS, 128, dtype)
    y = getattr(plain, name)(x, offsets, *parts)
    assert y.dtype == dtype
    if layout == "fp8":
        # A row's greatest magnitude becomes 448; codes have four significant bits, and 2^-9 between the least.
        codes, scale = plain.quantise_rows(x)
        assert torch.equal(codes.float().abs().amax(-1), torch.full((len(x),), 448.0))
        rounded = codes.double() * scale
        assert ((rounded - x).abs() <= x.double().abs() / 16 + scale * 2**-10).all()
        x = rounded
    # Two roundings in bfloat16, of a weight and of the result, 2^-9 each.
    assert error(y, dense(x, offsets, weight)) < (1e-5 if dtype == torch.float32 else 0.02)


def test_a_row_of_zeros_stays_one() -> None:
    codes, scale = plain.quantise_rows(torch.zeros(1, 32))
    assert not codes.float().any()
    assert scale.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(33, 64)}, r"x is \[33, 64\], not \[33, 128\]"),
        ({"x": torch.zeros(33, 128, dtype=torch.float64)}, "x is float64, not bfloat16 or float16 or float32"),
        ({"offsets": torch.zeros(5, dtype=torch.int64)}, r"offsets is \[5\], not \[6\]"),
        ({"codes": torch.zeros(5, 48, 64)}, "weight is float32, not uint8"),
        ({"scale": torch.ones(5, 48, 8)}, "scale has 8 groups for 128 columns; groups are of 32, 64 or 128"),
        ({"scale": torch.ones(5, 40, 4)}, r"scale is \[5, 40, 4\], not \[5, 48, 4\]"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Tensor], message: str) -> None:
    _, (codes, scale), _ = case("int4-32", len(COUNTS), OUTPUTS, 128, torch.float32)
    x, offsets = rows(COUNTS, 128, torch.float32)
    arguments = {"x": x, "offsets": offsets, "codes": codes, "scale": scale} | change
    with pytest.raises(ValueError, match=message):
        plain.grouped_int4(**arguments)


Call = Callable[..., Tensor]


def kernel(name: str, blocks: tuple[int, ...] | None, products: bool, *arguments: Any) -> Tensor:
    """products: whether float8 is multiplied as it is."""
    grouped = importlib.import_module("dgemma.kernels.grouped")
    grouped._multiplies_fp8 = lambda device: products
    return getattr(grouped, name)(*arguments, blocks=blocks and grouped.Blocks(*blocks))


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Call]:
    """`kernel` in a process of its own: Triton interprets all or nothing, from its import on."""
    with pytest.MonkeyPatch.context() as patch, ProcessPoolExecutor(1, get_context("spawn")) as pool:
        patch.setenv("TRITON_INTERPRET", "1")
        pool.submit(int).result()  # starts the process
        patch.undo()
        yield lambda *arguments: pool.submit(kernel, *arguments).result()


@needs_triton
@pytest.mark.parametrize("layout", CASES)
def test_kernels_are_their_twins(interpreted: Call, layout: str) -> None:
    """Columns are no multiple of a block's, nor outputs; in float32, so that only the order of sums differs."""
    columns = 128 + (128 if layout == "int4-128" else 64 if layout == "int4-64" else 32)
    name, parts, _ = case(layout, len(COUNTS), OUTPUTS, columns, torch.float32)
    x, offsets = rows(COUNTS, columns, torch.float32)
    expected = getattr(plain, name)(x, offsets, *parts)
    for products in (True, False) if layout == "fp8" else (True,):
        assert error(interpreted(name, (16, 32, 64), products, x, offsets, *parts), expected) < 1e-5


@needs_triton
@pytest.mark.parametrize("layout", ["bf16", "fp8", "int4-32", "nvfp4"])
def test_kernels_round_like_their_twins(interpreted: Call, layout: str) -> None:
    """One matrix for all, in 16 bits, with the blocks that a launcher chooses: at most a last bit differs.

    In float16, since the interpreter multiplies bfloat16 as if its bits were integers.
    """
    name, parts, _ = case(layout, 1, OUTPUTS, 96, torch.float16)
    x, offsets = rows((21,), 96, torch.float16)
    expected = getattr(plain, name)(x, offsets, *parts)
    y = interpreted(name, None, True, x, offsets.int(), *parts)
    assert y.dtype == torch.float16
    assert a_bit_apart(y, expected, 1e-5)


@needs_triton
def test_any_split_of_the_rows_finds_its_experts(interpreted: Call) -> None:
    name, parts, _ = case("bf16", 5, 16, 16, torch.float32)
    for counts in [(0, 0, 0, 0, 0), (0, 0, 0, 0, 3), (16, 16, 0, 32, 0), (1, 1, 1, 1, 1), (15, 17, 0, 0, 33)]:
        x, offsets = rows(counts, 16, torch.float32)
        y = interpreted(name, (16, 16, 16), True, x, offsets, *parts)
        assert torch.allclose(y, plain.grouped_bf16(x, offsets, *parts), atol=1e-5)


@needs_triton
def test_weights_that_lie_apart_are_refused(interpreted: Call) -> None:
    x, offsets = rows((3,), 32, torch.float32)
    with pytest.raises(ValueError, match="the weight is not contiguous"):
        interpreted("grouped_bf16", None, True, x, offsets, torch.zeros(1, 32, 48).mT)


@pytest.mark.gpu
@needs_gpu
@needs_triton
@pytest.mark.parametrize("layout", CASES)
@pytest.mark.parametrize(
    ("experts", "outputs", "columns"), [(128, 1408, 2816), (128, 2816, 704), (1, 4096, 2816)], ids=["up", "down", "one"]
)
def test_on_a_gpu_at_real_shapes(layout: str, experts: int, outputs: int, columns: int) -> None:
    """256 tokens, eight of 128 experts each. Float8 units sum a block's products with some 13 bits."""
    if layout == "int4-128" and columns % 128:
        pytest.skip("704 columns are no groups of 128")
    grouped = importlib.import_module("dgemma.kernels.grouped")
    torch.manual_seed(0)
    chosen = torch.rand(256, experts).topk(min(8, experts)).indices.flatten().bincount(minlength=experts)
    name, parts, _ = case(layout, experts, outputs, columns, torch.bfloat16, "cuda")
    x, offsets = rows(tuple(chosen.tolist()), columns, torch.bfloat16, "cuda")
    y = getattr(grouped, name)(x, offsets, *parts)
    assert a_bit_apart(y, getattr(plain, name)(x, offsets, *parts), 1e-2 if layout == "fp8" else 1e-3)
