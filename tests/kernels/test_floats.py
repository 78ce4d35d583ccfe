"""float32 products beside exact ones; where the processor has no vectors of 512 bits, nothing of it runs."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dgemma.config import FULL, ModelConfig
from dgemma.kernels import native
from dgemma.model.experts import Experts

pytestmark = pytest.mark.skipif(not native.has_wide_vectors(), reason="this processor has no vectors of 512 bits")


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("counts", [(0, 5, 16, 33, 64), (1,), (0, 0, 7), (130,)], ids=str)
@pytest.mark.parametrize(("outs", "columns"), [(8, 16), (5, 7), (96, 160), (33, 2816), (1, 1)])
def test_groups_of_rows_meet_their_own_matrix(counts: tuple[int, ...], outs: int, columns: int) -> None:
    x, weight = random(sum(counts), columns, seed=1), random(len(counts), outs, columns, seed=2)
    offsets = F.pad(torch.tensor(counts).cumsum(0), (1, 0))
    parts = list(zip(x.split(counts), weight, strict=True))
    exact = torch.cat([rows.double() @ one.double().T for rows, one in parts])
    bound = columns * 2**-24 * torch.cat([rows.double().abs() @ one.double().abs().T for rows, one in parts])
    assert ((native.grouped(x, offsets, weight) - exact).abs() <= bound + 1e-12).all()


def test_a_row_does_not_depend_on_its_neighbours_nor_on_threads() -> None:
    x, weight = random(100, 96, seed=1), random(3, 40, 96, seed=2)
    found = native.grouped(x, torch.tensor([0, 30, 30, 100]), weight)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(native.grouped(x, torch.tensor([0, 30, 30, 100]), weight), found)
    for row in (0, 29, 30, 77):
        e = 0 if row < 30 else 2
        assert torch.equal(native.grouped(x[row : row + 1], torch.tensor([0, 1]), weight[e])[0], found[row])


def test_experts_are_those_of_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(50, 24, 8, 12, 9, 2, 2, 1, 8, 1, 8, (FULL,), 4)
    modules = Experts(config).requires_grad_(False)
    for weight in modules.parameters():
        weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    x = random(40, 24, seed=3)
    weights, chosen = random(40, 9, seed=2)[:, :7].softmax(-1).topk(2)
    found = modules(x, weights, chosen)
    monkeypatch.setattr(native, "fits_grouped", lambda *tensors: False)
    torch.testing.assert_close(modules(x, weights, chosen), found, atol=1e-5, rtol=1e-5)
