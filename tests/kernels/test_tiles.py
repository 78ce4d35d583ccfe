"""Products in tile registers beside exact ones; where the processor has none, nothing of it runs."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dgemma.config import FULL, ModelConfig
from dgemma.kernels import native
from dgemma.model.experts import Experts
from dgemma.model.layers import linear
from dgemma.quant.formats import FORMATS

pytestmark = pytest.mark.skipif(not native.has_tiles(), reason="this processor has no tile registers")

COUNTS = [(0, 5, 16, 33, 64), (1,), (0, 0, 7), (200,)]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def close(found: Tensor, exact: Tensor) -> None:
    """One rounding of a result, and what float32 sums lose where they nearly cancel."""
    bound = 2**-8 * exact.abs() + 1e-4 * exact.abs().max()
    assert ((found.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize(("outs", "columns"), [(32, 32), (96, 160), (64, 2816)])
def test_groups_of_rows_meet_their_own_matrix(counts: tuple[int, ...], outs: int, columns: int) -> None:
    x, weight = random(sum(counts), columns, seed=1), random(len(counts), outs, columns, seed=2)
    offsets = F.pad(torch.tensor(counts).cumsum(0), (1, 0))
    exact = [rows.double() @ one.double().T for rows, one in zip(x.split(counts), weight, strict=True)]
    close(native.grouped(x, offsets, weight), torch.cat(exact))


def test_int8_rows_give_exact_sums_at_any_size() -> None:
    generator = torch.Generator().manual_seed(0)
    for counts in COUNTS:
        x = torch.randint(-128, 128, (sum(counts), 192), dtype=torch.int8, generator=generator)
        codes = torch.randint(-128, 128, (len(counts), 64, 192), dtype=torch.int8, generator=generator)
        own, units = torch.rand(len(x), 1, generator=generator), torch.rand(len(counts), 64, 1, generator=generator)
        found = native.grouped_int8(x, own, torch.tensor(counts), torch.float32, codes, units)
        pieces = zip(x.split(counts), own.split(counts), codes, units, strict=True)
        exact = torch.cat([(rows.long() @ one.long().T).float() * o * u.T for rows, o, one, u in pieces])
        assert torch.equal(found, exact)


@pytest.mark.parametrize("kind", ["fp8", "int8", "int4", "nvfp4", "nvfp4 divided"])
def test_packed_stacks_are_their_dense_ones(kind: str) -> None:
    """Codes become bfloat16 as the format says, scales in either width; one matrix, and one of a stack too."""
    for counts, outs, columns, group in [((7, 0, 40), 32, 128, 32), ((1, 2, 3), 96, 2816, 128)]:
        name = kind.partition(" ")[0]
        weight = random(3, outs, columns, seed=1).float()
        parts = [FORMATS[name].encode(one, group) for one in weight]
        stacked = {part: torch.stack([each[part] for each in parts]) for part in parts[0]}
        if name == "int4":
            stacked["scale"] = stacked["scale"].float()
        if kind == "nvfp4":  # as modelopt has it
            stacked["factor"] = 1 / stacked["factor"]
        options = {"divide": kind.endswith("divided")} if name == "nvfp4" else {}
        stack = FORMATS[name](weight.shape, torch.bfloat16, **options, **stacked)
        x, stored = random(sum(counts), columns, seed=2), stack.stored(None)
        assert native.fits_stored(x, stored)
        dense = stack.dense()
        assert (dense - weight).square().mean() < 0.02 * weight.square().mean()
        one_hot = torch.eye(columns, dtype=torch.bfloat16)
        assert torch.equal(stack.product(one_hot, 1), dense[1].T), "every weight to the last bit"
        pieces = list(zip(x.split(counts), dense.double(), strict=True))
        close(stack.grouped(x, torch.tensor(counts)), torch.cat([rows.double() @ one.T for rows, one in pieces]))
        close(stack.product(x, 2), x.double() @ dense[2].double().T)
        one = FORMATS[name](weight.shape[1:], torch.bfloat16, **options, **{k: v[1] for k, v in stacked.items()})
        close(one.product(x), x.double() @ dense[1].double().T)


def test_layers_take_them_and_others_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    real = native.grouped
    monkeypatch.setattr(native, "grouped", lambda *parts: taken.append(1) or real(*parts))
    x, weight = random(2, 3, 64, seed=1), random(32, 64, seed=2)
    close(linear(x, weight), x.double() @ weight.double().T)
    close(linear(x.transpose(0, 1), weight), x.transpose(0, 1).double() @ weight.double().T)
    assert len(taken) == 2
    for other in (
        linear(x, weight[:31]),
        linear(x, weight.clone().requires_grad_()),
    ):
        assert other.shape[:2] == x.shape[:2]
    assert len(taken) == 2


@pytest.mark.parametrize("threads", [1, 2])
def test_onednn_is_undisturbed_between_the_calls(threads: int) -> None:
    """It sets the registers up too, and remembers that it has."""
    torch.set_num_threads(threads)
    x, weight, odd = random(256, 256, seed=1), random(256, 256, seed=2), random(250, 256, seed=3)
    first = F.linear(x, odd)
    for _ in range(20):
        close(linear(x, weight), x.double() @ weight.double().T)
        assert torch.equal(F.linear(x, odd), first)


def test_experts_are_those_of_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(50, 64, 8, 32, 9, 2, 2, 1, 8, 1, 8, (FULL,), 4)
    modules = Experts(config).bfloat16().requires_grad_(False)
    for weight in modules.parameters():
        weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    x = random(40, 64, seed=3)
    weights, chosen = random(40, 9, seed=2).float()[:, :7].softmax(-1).topk(2)
    found = modules(x, weights, chosen)
    monkeypatch.setattr(native, "fits_grouped", lambda *tensors: False)
    plain = modules(x, weights, chosen)
    assert (found - plain).abs().max() < 0.02 * plain.abs().max()
