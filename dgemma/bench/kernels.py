"""`python -m dgemma.bench.kernels`: grouped products of each weight format on a CUDA device, beside torch's in bf16.

The shapes are the released model's: 256 tokens, each with 8 of 128 experts, and one plain linear. Random weights.
"""

import sys
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

TOKENS, TOP_K, REPEATS = 256, 8, 20
SHAPES = {"gate_up": (128, 1408, 2816), "down": (128, 2816, 704), "linear": (1, 4096, 2816)}
"""Experts, outputs, columns."""

Product = tuple[Callable[..., Tensor], tuple[Tensor, ...]]
"""A function of rows, offsets and the weight's parts, and these parts."""


def products(experts: int, outputs: int, columns: int) -> dict[str, Product]:
    """By name; torch's loop over the experts, which is told the offsets on the host, and its own grouped product."""
    from dgemma.kernels import grouped

    def random(*shape: int) -> Tensor:
        return torch.randint(1, 120, (experts, outputs, *shape), dtype=torch.uint8, device="cuda")

    weight = torch.randn(experts, outputs, columns, dtype=torch.bfloat16, device="cuda")
    codes, scale = random(columns // 2), torch.ones(experts, outputs, 1, device="cuda")
    found: dict[str, Product] = {
        "torch, bf16 loop": (_loop, (weight,)),
        "bf16": (grouped.grouped_bf16, (weight,)),
        "fp8": (grouped.grouped_fp8, (random(columns), scale)),
        "int4, groups of 32": (grouped.grouped_int4, (codes, random(columns // 32).bfloat16())),
        "nvfp4": (grouped.grouped_nvfp4, (codes, random(columns // 16), scale)),
    }
    torchs = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if torchs is not None:
        found["torch, bf16 grouped_mm"] = (lambda x, offsets, w: torchs(x, w.mT, offs=offsets[1:]), (weight,))
    return found


def _loop(x: Tensor, counts: list[int], weight: Tensor) -> Tensor:
    return torch.cat([F.linear(rows, w) for rows, w in zip(x.split(counts), weight, strict=True) if len(rows)])


def seconds(call: Callable[[], object]) -> float:
    """Median time of a captured graph, as in a step: no launches count, and the cache holds none of the weights."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    for _ in range(3):
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times = []
    for _ in range(REPEATS):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return median(times)


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("this measures kernels on a CUDA device, and torch sees none")
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; {TOKENS} tokens, median of {REPEATS}")
    print(f"{'':<26}{'µs':>8}{'GB/s':>8}{'× loop':>8}")
    for shape, (experts, outputs, columns) in SHAPES.items():
        top = min(TOP_K, experts)
        counts = torch.rand(TOKENS, experts).topk(top).indices.flatten().bincount(minlength=experts)
        offsets = F.pad(counts.cumsum(0), (1, 0)).int().cuda()
        x = torch.randn(TOKENS * top, columns, dtype=torch.bfloat16, device="cuda")
        print(f"{shape}: {experts} × {outputs} × {columns}")
        loop = 0.0
        for name, (product, parts) in products(experts, outputs, columns).items():
            split = counts.tolist() if product is _loop else offsets
            time = seconds(partial(product, x, split, *parts))
            loop = loop or time
            rate = sum(part.nbytes for part in parts) / time / 1e9
            print(f"  {name:<24}{time * 1e6:>8.0f}{rate:>8.0f}{loop / time:>8.2f}", flush=True)


if __name__ == "__main__":
    main()
