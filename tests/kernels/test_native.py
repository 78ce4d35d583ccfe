"""What is in C beside its plain twins: the same bits."""

import shutil

import numpy as np
import pytest
import torch
from torch import Tensor

from dgemma.decoding import guided
from dgemma.decoding.constraint import Guide, TokenAutomaton
from dgemma.decoding.vocabulary import weigh_
from dgemma.kernels import native
from dgemma.kernels.numbers import quantise_rows
from dgemma.quant.formats import FORMATS
from dgemma.quant.integers import W4A8
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


@pytest.mark.parametrize("group", [32, 64, 128])
def test_int4_becomes_w4a8_alike(monkeypatch: pytest.MonkeyPatch, group: int) -> None:
    weight = random(20, 512) * torch.logspace(-2, 0, 512)
    codes, scale = W4A8.to_int4(**W4A8.encode(weight, group))
    for scales in (scale, scale * torch.linspace(1, 1.01, scale.shape[-1])):
        found = W4A8.of_int4(codes, scales.bfloat16())
        with monkeypatch.context() as patch:
            patch.setattr(native, "library", lambda: None)
            plain = W4A8.of_int4(codes, scales.bfloat16())
        assert (found is None) == (plain is None) == (scales is not scale)
        for name in found or ():
            assert torch.equal(found[name], plain[name])


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
        [(10, 128), (7, 2816), (64, 96), (32, 256)], [[7, 0, 4], [1, 2, 13], [0, 0, 1], [40, 0, 17]], strict=True
    ):
        if kind == "int8":
            columns += 3 if out < 32 else 0  # no whole number of vectors
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [5, 31, 512, 1000, 33000])
def test_rows_of_scores_are_read_alike(size: int, dtype: torch.dtype) -> None:
    n = 40
    scores = (random(n, size) * torch.linspace(0.1, 60, n)[:, None]).to(dtype)
    temperature, uniform = torch.linspace(0.4, 1.0, n)[:, None], torch.linspace(0, 1 - 2**-24, n)
    weights, plain_weights = scores.clone(), scores.clone()
    best, proposal, entropy, total = native.read_rows(weights, 30.0, temperature, uniform)
    expected = weigh_(plain_weights, 30.0, temperature, uniform)
    torch.testing.assert_close(entropy, expected[2], atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(total, expected[3], rtol=2e-5, atol=0)
    torch.testing.assert_close(weights, plain_weights, rtol=1e-2 if dtype == torch.bfloat16 else 2e-5, atol=1e-30)
    assert (weights.gather(1, best[:, None]) == 1).all()
    ends = plain_weights.double().cumsum(-1) / plain_weights.double().sum(-1, keepdim=True)
    far = (ends - uniform[:, None]).abs().amin(-1) > (2e-3 if dtype == torch.bfloat16 else 1e-5)
    assert far.sum() > 5
    assert torch.equal(proposal[far], expected[1][far])
    assert (plain_weights.gather(1, proposal[:, None]) > 0).all()


def test_scores_that_are_no_numbers_end_in_some_token() -> None:
    scores = random(2, 100)
    scores[0] = torch.nan
    best, proposal, entropy, _ = native.read_rows(scores, 30.0, torch.ones(2, 1), torch.tensor([0.5, 0.5]))
    assert ((best >= 0) & (best < 100) & (proposal >= 0) & (proposal < 100)).all()
    assert entropy.isnan().tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [3, 32, 70])
def test_canvases_that_keep_to_an_automaton_are_read_alike(
    monkeypatch: pytest.MonkeyPatch, length: int, dtype: torch.dtype
) -> None:
    rng = np.random.default_rng(length)
    size, kinds, states = 900, 12, 5
    classes = rng.integers(0, kinds, size).astype(np.int32)
    classes[300:600] = 3  # a class of many, beside those of few
    table = rng.integers(0, states, (states, kinds)).astype(np.int32)
    table[:, 0] = -1
    automaton = TokenAutomaton(classes, table, np.ones(states, bool))
    guide = Guide(automaton, 0, automaton.done, {1: int((classes == 5).argmax())}, length)
    scores = (random(size, length, seed=length) * 8).to(dtype)
    draws = rng.random(length)
    arguments = (scores, 30.0, torch.tensor([0.6]), draws, guide, 1e9, True)
    best, entropy, proposal, free, total = guided._natively(*arguments)
    wanted = guided._plainly(*arguments)
    assert torch.equal(best, wanted[0])
    torch.testing.assert_close(entropy, wanted[1], atol=3e-5, rtol=3e-5)
    torch.testing.assert_close(free, wanted[3], rtol=1e-2 if dtype == torch.bfloat16 else 3e-5, atol=1e-30)
    torch.testing.assert_close(total, wanted[4], rtol=3e-5, atol=0)
    assert (proposal == wanted[2]).float().mean() > 0.9  # but where a draw falls beside a border, and the path changes
    for tokens in (best, proposal):
        assert automaton.after(tokens.tolist()) >= 0
