"""Adam, and Muon for the matrices where asked for; float32 masters of weights in less. No weight decay.

Sources: Kingma and Ba, arXiv 1412.6980; Keller Jordan's Muon (2024), arXiv 2502.16982.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

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


class MuonAdam:
    """Muon on the weights named in `matrices` (2-D, or 3-D stacks such as fused experts), Adam on all others.

    Weights that are not float32 get a float32 master, which is what is moved; they follow it, rounded.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        matrices: frozenset[str] = frozenset(),
        *,
        muon_rate: float = 0.02,
        adam_rate: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.98),
    ):
        self.weights = {name: weight.detach() for name, weight in weights.items()}
        self.masters = {name: weight.float() for name, weight in self.weights.items()}
        self.matrices = [name for name in weights if name in matrices]
        self.others = [name for name in weights if name not in matrices]
        self.muon_rate, self.adam_rate, self.momentum, self.betas = muon_rate, adam_rate, momentum, betas
        zeros = lambda names: {name: torch.zeros_like(self.masters[name]) for name in names}  # noqa: E731
        self.velocity, self.mean, self.square = zeros(self.matrices), zeros(self.others), zeros(self.others)
        self.steps = 0

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], factor: float = 1.0) -> None:
        """Moves all weights; gradients float32 by name; `factor` scales both rates."""
        self.steps += 1
        self._muon(gradients, self.muon_rate * factor)
        self._adam(gradients, self.adam_rate * factor)
        for name, weight in self.weights.items():
            if weight is not self.masters[name]:
                weight.copy_(self.masters[name])

    def _muon(self, gradients: Mapping[str, Tensor], rate: float) -> None:
        alike = defaultdict(list)
        for name in self.matrices:
            velocity = self.velocity[name].lerp_(gradients[name], 1 - self.momentum)
            alike[velocity.shape[-2:]].append((self.masters[name], gradients[name].lerp(velocity, self.momentum)))
        for (rows, columns), pairs in alike.items():
            stacks = [update.reshape(-1, rows, columns) for _, update in pairs]
            updates = orthogonalise(torch.cat(stacks)).split([len(stack) for stack in stacks])
            for (weight, _), update in zip(pairs, updates, strict=True):
                weight.sub_(update.view_as(weight), alpha=rate * max(1.0, rows / columns) ** 0.5)

    def _adam(self, gradients: Mapping[str, Tensor], rate: float) -> None:
        if not self.others:
            return
        of = lambda tensors: [tensors[name] for name in self.others]  # noqa: E731
        grads, mean, square = of(gradients), of(self.mean), of(self.square)
        torch._foreach_lerp_(mean, grads, 1 - self.betas[0])
        torch._foreach_mul_(square, self.betas[1])
        torch._foreach_addcmul_(square, grads, grads, 1 - self.betas[1])
        unbiased = [1 - beta**self.steps for beta in self.betas]
        divisor = torch._foreach_sqrt(square)
        torch._foreach_div_(divisor, unbiased[1] ** 0.5)
        torch._foreach_add_(divisor, 1e-8)
        torch._foreach_addcdiv_(of(self.masters), mean, divisor, -rate / unbiased[0])

    def state_dict(self) -> dict[str, Any]:
        """All that a later run needs to go on: steps, moments, and masters where there are any."""
        masters = {name: master for name, master in self.masters.items() if master is not self.weights[name]}
        moments = {"velocity": self.velocity, "mean": self.mean, "square": self.square}
        return {"steps": self.steps, "masters": masters, **moments}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = state["steps"]
        for own, stored in ((getattr(self, key), state[key]) for key in ("velocity", "mean", "square", "masters")):
            for name, tensor in stored.items():
                own[name].copy_(tensor)
