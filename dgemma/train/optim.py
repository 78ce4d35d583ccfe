"""Muon for the matrices, Adam for the rest, in one optimiser. Source: Keller Jordan's Muon (2024), arXiv 2502.16982."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

# Coefficients of the quintic Newton-Schulz iteration that pushes all singular values towards 1.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest (semi-)orthogonal matrix of each of [n, rows, columns], by Newton-Schulz iteration."""
    a, b, c = NEWTON_SCHULZ
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if wide else matrices.transpose(-2, -1)
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(steps):
        gram = x @ x.transpose(-2, -1)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.transpose(-2, -1)


class MuonAdam(torch.optim.Optimizer):
    """Muon on `matrices` (2-D, or 3-D stacks such as fused experts), Adam on `others`, each at its own rate."""

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        muon_lr: float = 0.02,
        adam_lr: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.98),
    ):
        groups = [
            {"params": list(matrices), "lr": muon_lr, "muon": True},
            {"params": list(others), "lr": adam_lr, "muon": False},
        ]
        super().__init__(groups, {"momentum": momentum, "betas": betas})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            moved = [(p, p.grad) for p in group["params"] if p.grad is not None]
            if group["muon"]:
                self._muon(moved, group["lr"], group["momentum"])
            else:
                self._adam(moved, group["lr"], group["betas"])

    def _muon(self, moved: list[tuple[Tensor, Tensor]], lr: float, momentum: float) -> None:
        alike = defaultdict(list)
        for p, grad in moved:
            state = self.state[p]
            if not state:
                state["velocity"] = torch.zeros_like(p)
            velocity = state["velocity"].lerp_(grad, 1 - momentum)
            alike[tuple(p.shape[-2:])].append((p, grad.lerp(velocity, momentum)))
        for (rows, columns), pairs in alike.items():
            stacks = [update.reshape(-1, rows, columns) for _, update in pairs]
            updates = orthogonalise(torch.cat(stacks)).split([len(stack) for stack in stacks])
            for (p, _), update in zip(pairs, updates, strict=True):
                p.sub_(update.view_as(p), alpha=lr * max(1.0, rows / columns) ** 0.5)

    def _adam(self, moved: list[tuple[Tensor, Tensor]], lr: float, betas: tuple[float, float]) -> None:
        for p, grad in moved:
            state = self.state[p]
            if not state:
                state.update(step=0, mean=torch.zeros_like(p), square=torch.zeros_like(p))
            state["step"] += 1
            state["mean"].lerp_(grad, 1 - betas[0])
            state["square"].mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
            mean = state["mean"] / (1 - betas[0] ** state["step"])
            square = state["square"] / (1 - betas[1] ** state["step"])
            p.sub_(mean / (square.sqrt() + 1e-8), alpha=lr)
