"""Parts of a layer against their plain definitions in float32."""

import pytest
import torch
from torch import Tensor

from dgemma.config import FULL, ModelConfig, Rope
from dgemma.model import attention
from dgemma.model.attention import attend
from dgemma.model.experts import Experts, Router
from dgemma.model.layers import inverse_frequencies, rms_norm

CONFIG = ModelConfig(20, 12, 8, 6, 5, 3, 2, 1, 8, 1, 8, (FULL,), 4)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None) -> Tensor:
    batch, heads, length, _ = q.shape
    seen = k.shape[2]
    out = torch.empty_like(q)
    for b in range(batch):
        for h in range(heads):
            group = h // (heads // k.shape[1])
            for i in range(length):
                at = seen - length + i
                keys = [j for j in range(seen) if not causal or (j <= at and (window is None or j > at - window))]
                weights = torch.softmax(k[b, group, keys] @ q[b, h, i], -1)
                out[b, h, i] = weights @ v[b, group, keys]
    return out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("limit", [1, 70, 1 << 26, "fused"])
def test_attention_in_any_tiles(monkeypatch, causal, window, limit):
    if limit == "fused":
        monkeypatch.setattr(attention, "fits_fused", lambda *_: True)
    else:
        monkeypatch.setattr(attention, "SCORES_LIMIT", limit)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, n, 8, generator=generator) for heads, n in ((4, 5), (2, 9), (2, 9)))
    torch.testing.assert_close(attend(q, k, v, causal, window), plain_attention(q, k, v, causal, window))


def test_experts_match_a_loop_over_tokens():
    torch.manual_seed(0)
    router, experts = Router(CONFIG), Experts(CONFIG)
    with torch.no_grad():
        for tensor in (*router.parameters(), *experts.parameters()):
            tensor.uniform_(-1, 1)
    x = torch.randn(17, CONFIG.hidden_size)
    weights, chosen = router(x)
    y = experts(x, weights, chosen)
    for i, row in enumerate(x):
        normed = row / (row.square().mean() + CONFIG.rms_norm_eps).sqrt()
        p = torch.softmax(router.proj.weight @ (normed * router.scale / CONFIG.hidden_size**0.5), 0)
        top = p.argsort(descending=True)[: CONFIG.top_k_experts]
        assert sorted(chosen[i].tolist()) == sorted(top.tolist())
        expected = torch.zeros_like(row)
        for e in top:
            gate, up = (experts.gate_up_proj[e] @ row).chunk(2)
            inner = torch.nn.functional.gelu(gate, approximate="tanh") * up
            share = p[e] / p[top].sum() * router.per_expert_scale[e]
            expected += share * (experts.down_proj[e] @ inner)
        torch.testing.assert_close(y[i], expected, atol=1e-5, rtol=1e-5)


def test_norm_is_computed_in_float32():
    """Values whose squares bfloat16 could not tell apart, and a weight that multiplies as it is."""
    x = (300 + torch.arange(64.0)).to(torch.bfloat16)
    weight = torch.full((64,), 0.5, dtype=torch.bfloat16)
    expected = x.double() / x.double().square().mean().sqrt() * 0.5
    assert torch.equal(rms_norm(x, weight, 1e-6), expected.to(torch.bfloat16))


def test_frequencies_of_the_released_model():
    full = inverse_frequencies(Rope(1e6, "proportional", 0.25), 512, torch.device("cpu"))
    assert full.shape == (256,)
    assert torch.equal(full[64:], torch.zeros(192))
    torch.testing.assert_close(full[:64].double(), 1e6 ** (-2 * torch.arange(64).double() / 512), rtol=1e-6, atol=0)
    sliding = inverse_frequencies(Rope(1e4), 256, torch.device("cpu"))
    torch.testing.assert_close(sliding.double(), 1e4 ** (-2 * torch.arange(128).double() / 256), rtol=1e-6, atol=0)
