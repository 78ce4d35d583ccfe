"""The sparse branch: a router that picks k of E experts for a token, and the experts, stored fused."""

import torch
from torch import Tensor, nn

from dgemma.config import ModelConfig
from dgemma.model import layers
from dgemma.model.layers import Linear, RMSNorm, linear


class Router(nn.Module):
    """x [N, hidden] to (weights float32 [N, k], experts int64 [N, k]); weights sum to 1 before the experts' scale."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.top_k = config.top_k_experts
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, scale=False)
        self.scale = nn.Parameter(torch.ones(config.hidden_size))
        self.per_expert_scale = nn.Parameter(torch.ones(config.num_experts))
        self.proj = Linear(config.hidden_size, config.num_experts)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.proj(self.norm(x) * self.scale * x.shape[-1] ** -0.5)
        weights, experts = scores.softmax(-1, dtype=torch.float32).topk(self.top_k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        return weights * self.per_expert_scale[experts], experts


class Experts(nn.Module):
    """E gated MLPs: `gate_up_proj` [E, 2 * inner, hidden] (gate rows first), `down_proj` [E, hidden, inner]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        count, hidden, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(count, hidden, inner))

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """Weighted sum of each token's experts, [N, hidden]."""
        k = experts.shape[1]
        order = experts.flatten().argsort()
        counts = experts.flatten().bincount(minlength=len(self.down_proj)).tolist()
        grouped = x.index_select(0, order // k).split(counts)
        outputs = [self._expert(e, rows) for e, rows in enumerate(grouped) if len(rows)]
        y = torch.cat(outputs).index_select(0, order.argsort()).unflatten(0, (-1, k))
        return (weights[:, None] @ y.float()).squeeze(1).type_as(x)

    def _expert(self, expert: int, x: Tensor) -> Tensor:
        gate, up = linear(x, self.gate_up_proj[expert]).chunk(2, dim=-1)
        return linear(layers.gated(gate, up), self.down_proj[expert])
