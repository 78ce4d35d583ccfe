"""Decoding in C beside its plain twin: the same bits."""

import shutil

import pytest
import torch
from torch import Tensor

from dgemma.kernels import native
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
