"""The sparse branch: a router that picks k of E experts for a token, and the experts, stored fused."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgemma.config import ModelConfig
from dgemma.kernels import elementwise, native
from dgemma.model import layers
from dgemma.model.layers import Linear, RMSNorm, linear

Product = Callable[[int, Tensor], Tensor]


def fits_grouped(*tensors: Tensor) -> bool:
    """Whether torch multiplies all groups in one call, without the host knowing their sizes; it does so in bfloat16."""
    fitting = lambda t: (  # noqa: E731
        t.is_cuda and t.shape[-1] % 8 == 0 and (t.dtype == torch.bfloat16 or torch.is_autocast_enabled("cuda"))
    )
    return all(isinstance(t, Tensor) and fitting(t) for t in tensors)


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
        # Not indexed: the gradient of that adds all tokens up at k of E places, one after the other.
        return weights * self.per_expert_scale.expand(len(x), -1).gather(1, experts), experts


class Experts(nn.Module):
    """E gated MLPs: `gate_up_proj` [E, 2 * inner, hidden] (gate rows first), `down_proj` [E, hidden, inner]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.count, self.hidden, self.inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.count, 2 * self.inner, self.hidden))
        self.down_proj = nn.Parameter(torch.empty(self.count, self.hidden, self.inner))

    @property
    def waits(self) -> bool:
        """Whether the host has to be told how many rows each expert gets, which a CUDA graph cannot."""
        return not fits_grouped(self.gate_up_proj, self.down_proj)

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """Weighted sum of each token's experts, [N, hidden]."""
        k = experts.shape[1]
        order = experts.flatten().argsort()
        counts = torch.zeros(self.count, dtype=torch.int64, device=x.device)
        counts.scatter_add_(0, experts.flatten(), torch.ones_like(order))  # bincount would wait for a GPU
        y, places = self.sorted(x.index_select(0, order // k), counts), order.argsort()
        if elementwise.fits_inference(y) and elementwise.fits_inference(weights):
            return elementwise.weighted_sums(y, weights, places.view(-1, k))
        return (weights[:, None] @ y.index_select(0, places).unflatten(0, (-1, k)).float()).squeeze(1).type_as(x)

    def sorted(self, rows: Tensor, counts: Tensor) -> Tensor:
        """What the experts make of rows [n, hidden] that are sorted by expert, so many for each."""
        stacks = (self.gate_up_proj, self.down_proj)
        if fits_grouped(rows, *stacks):
            ends = counts.cumsum(0).int()
            ups, downs = (stack.to(torch.bfloat16).mT for stack in stacks)
            gate, up = F.grouped_mm(rows.to(torch.bfloat16), ups, offs=ends).chunk(2, dim=-1)
            return F.grouped_mm(layers.gated(gate, up), downs, offs=ends)
        if all(isinstance(stack, Tensor) and native.fits_grouped(rows, stack) for stack in stacks):
            offsets = F.pad(counts.cumsum(0), (1, 0))
            inner = layers.gated(*native.grouped(rows, offsets, self.gate_up_proj).chunk(2, dim=-1))
            return native.grouped(inner, offsets, self.down_proj)
        return torch.cat(self.each(rows.split(counts.tolist())))

    def each(self, groups: Sequence[Tensor]) -> list[Tensor]:
        """What each expert makes of its own tokens [n, hidden]; an expert without tokens has no entry."""
        up, down = self.products()
        return [
            down(e, layers.gated(*up(e, rows).chunk(2, dim=-1)))  # the gate's half comes first
            for e, rows in enumerate(groups)
            if len(rows)
        ]

    def products(self) -> tuple[Product, Product]:
        """x [n, hidden] to [n, 2 * inner], and x [n, inner] to [n, hidden], for an expert by number."""
        # Unbound once: the gradient of an index would fill the whole stack for each expert.
        ups, downs = self.gate_up_proj.unbind(), self.down_proj.unbind()
        return lambda e, x: linear(x, ups[e]), lambda e, x: linear(x, downs[e])
