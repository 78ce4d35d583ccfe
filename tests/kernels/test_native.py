"""What is in C beside its plain twins: the same bits."""

import shutil

import pytest
import torch
from torch import Tensor

from dgemma.kernels import native
from dgemma.kernels.numbers import quantise_rows
from dgemma.quant.formats import FORMATS
from dgemma.quant.packed import Packed

SHAPES = [(1, 128), (3, 256), (50, 384), (2, 4224), (2, 3, 20, 256)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _built() -> None:
    if native.library() is None and not shutil.which("cc"):
        pytest.skip("there was no compiler when this was installed")


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_parts(kind: str, shape: tuple[int, ...], group: int, seed: int) -> dict[str, Tensor]:
    """Any codes at all, not only those that a quantised matrix would have."""
    generator = torch.Generator().manual_seed(seed)

    def whole(last: int, most: int = 256) -> Tensor:
        return torch.randint(most, (*shape[:-1], last), dtype=torch.uint8, generator=generator)

    def floats(last: int) -> Tensor:
        return torch.randn(*shape[:-1], last, generator=generator)

    columns = shape[-1]
    return {
        "int4": lambda: {"codes": whole(columns // 2), "scale": floats(columns // group).bfloat16()},
        "fp8": lambda: {"codes": whole(columns), "scale": floats(1).bfloat16()},
        "nvfp4": lambda: {
            "codes": whole(columns // 2),
            "scale": whole(columns // 16, 127),
            "factor": floats(1).abs() + 0.1,
        },
        "w4a8": lambda: {
            "codes": whole(columns // 2),
            "multiple": whole(columns // group, 15) + 1,
            "units": floats(1).abs(),
        },
    }[kind]()


def plainly(monkeypatch: pytest.MonkeyPatch, matrix: Packed) -> Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(native, "library", lambda: None)
        return matrix.dense()


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["int4", "fp8", "nvfp4", "w4a8"])
def test_the_same_bits(monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype, group: int) -> None:
    assert native.library() is not None
    for seed, shape in enumerate(SHAPES):
        matrix = FORMATS[kind](shape, dtype, **random_parts(kind, shape, group, seed))
        torch.testing.assert_close(bits(matrix.dense()), bits(plainly(monkeypatch, matrix)), rtol=0, atol=0)


def test_either_way_of_a_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = random_parts("nvfp4", (40, 512), 16, 1)
    multiplied = FORMATS["nvfp4"]((40, 512), torch.bfloat16, divide=False, **parts)
    assert torch.equal(bits(multiplied.dense()), bits(plainly(monkeypatch, multiplied)))
    assert not torch.equal(multiplied.dense(), FORMATS["nvfp4"]((40, 512), torch.bfloat16, **parts).dense())


def test_what_is_no_number_stays_none(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = random_parts("int4", (4, 64), 32, 0)
    parts["scale"][1, 1], parts["scale"][2, 0] = torch.nan, torch.inf
    matrix = FORMATS["int4"]((4, 64), torch.bfloat16, **parts)
    torch.testing.assert_close(matrix.dense(), plainly(monkeypatch, matrix), equal_nan=True, rtol=0, atol=0)


def test_threads_of_torch_share_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = FORMATS["int4"]((301, 256), torch.float32, **random_parts("int4", (301, 256), 32, 3))
    torch.set_num_threads(3)
    assert torch.equal(matrix.dense(), plainly(monkeypatch, matrix))


def test_parts_that_do_not_lie_in_a_row_go_the_plain_way() -> None:
    parts = random_parts("fp8", (8, 64), 32, 0)
    apart = torch.cat((parts["codes"], parts["codes"]), 1)[:, ::2]
    matrix = FORMATS["fp8"]((8, 64), torch.float32, codes=apart, scale=parts["scale"])
    assert not native.fits(torch.float32, *matrix.buffers())
    copied = FORMATS["fp8"]((8, 64), torch.float32, codes=apart.contiguous(), scale=parts["scale"])
    assert torch.equal(matrix.dense(), copied.dense())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_rounded_to_the_same_numbers(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    for rows, columns in ((1, 5), (3, 1024), (40, 2816), (2, 3000)):
        x = (random(rows, columns, seed=rows) * torch.logspace(-4, 4, rows)[:, None]).to(dtype)
        x[-1, 0] = 0
        x[0, :2] = torch.tensor([1.0, -1.0]) * x[0].abs().max()
        if rows > 2:
            x[1] = 0
        codes, scale = quantise_rows(x)
        with monkeypatch.context() as patch:
            patch.setattr(native, "library", lambda: None)
            plain_codes, plain_scale = quantise_rows(x)
        assert torch.equal(codes, plain_codes)
        assert torch.equal(scale, plain_scale)


def test_a_row_with_no_number_has_no_scale() -> None:
    x = random(3, 2000)
    x[1, 7] = torch.nan
    assert quantise_rows(x)[1].isnan().flatten().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["int8", "w4a8"])
def test_experts_give_the_same_bits(monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype) -> None:
    if not native.has_dot_products():
        pytest.skip("this processor has no products of 8-bit numbers with 32-bit sums")
    options = {"activations": True} if kind == "int8" else {}
    for (out, columns), counts in zip(
        [(10, 128), (7, 2816), (64, 96)], [[7, 0, 4], [1, 2, 13], [0, 0, 1]], strict=True
    ):
        if kind == "int8":
            columns += 3  # no whole number of vectors
            codes = torch.randint(-127, 128, (3, out, columns), dtype=torch.int8)
            parts = {"codes": codes, "scale": random(3, out, 1).abs().bfloat16()}
        else:
            parts = random_parts(kind, (3, out, columns), 32, out)
        stack = FORMATS[kind]((3, out, columns), dtype, **options, **parts)
        x = random(sum(counts), columns, seed=1).to(dtype)
        found = stack.grouped(x, torch.tensor(counts))
        with monkeypatch.context() as patch:
            patch.setattr(native, "has_dot_products", lambda: False)
            assert torch.equal(found, stack.grouped(x, torch.tensor(counts)))
        exact = torch.cat([rows.double() @ stack.dense(e).double().t() for e, rows in enumerate(x.split(counts))])
        assert (found - exact).square().mean() < 3e-4 * exact.square().mean()
