"""`dgemma bench experts`: one layer's experts in every format, in turns, beside the same in bfloat16."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from time import perf_counter
from typing import Any

from dgemma.bench.harness import Spread, cores, machine, versions
from dgemma.bench.shapes import SHAPES


@dataclass(frozen=True)
class Result:
    """Seconds of the sparse branch of a layer for a canvas, by format; `ratios`: bfloat16's over them, turn by turn."""

    shape: str
    experts: int
    rows: float
    threads: int
    repeats: int
    machine: str
    versions: dict[str, str]
    seconds: dict[str, Spread]
    ratios: dict[str, Spread]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def run(
    shape: str = "26b",
    experts: int | None = None,
    formats: Sequence[str] = (),
    repeats: int = 9,
    threads: int | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Result:
    """experts: so many instead of the shape's; a canvas shrinks with them, so that each gets as many rows."""
    if shape not in SHAPES:
        raise ValueError(f"shape {shape!r} is not known; known: {', '.join(SHAPES)}")
    import torch

    from dgemma.model.experts import Experts
    from dgemma.quant.modules import QuantExperts
    from dgemma.quant.quantize import Quantization

    torch.set_num_threads(threads or cores())
    config = SHAPES[shape].config
    count = experts or config.num_experts
    if not config.top_k_experts <= count <= config.num_experts:
        raise ValueError(f"experts must be {config.top_k_experts} to {config.num_experts}, not {experts}")
    tokens = config.canvas_length * count // config.num_experts
    generator = torch.Generator().manual_seed(0)
    base = Experts(replace(config, num_experts=count)).to(torch.bfloat16).requires_grad_(False)
    for weight in base.parameters():
        weight.normal_(0, 0.02, generator=generator)
    sides: dict[str, Experts] = {"bf16": base}
    for format in formats:
        progress(f"quantising to {format}")
        sides[format] = QuantExperts(
            base,
            *(
                Quantization(format).pack(
                    f"layers.0.experts.{name}", tuple(weight.shape), weight.dtype, enumerate(weight.data)
                )
                for name, weight in (("gate_up_proj", base.gate_up_proj), ("down_proj", base.down_proj))
            ),
        )
    x = torch.randn(tokens, config.hidden_size, generator=generator).bfloat16()
    scores = torch.rand(tokens, count, generator=generator)
    weights, chosen = scores.topk(config.top_k_experts, dim=-1)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    with torch.inference_mode():
        for turn in range(repeats + 1):
            progress(f"turn {turn} of {repeats}")
            for name, side in sides.items():
                started = perf_counter()
                side(x, weights, chosen)
                if turn:  # the first one warms up
                    seconds[name].append(perf_counter() - started)
    return Result(
        shape=shape,
        experts=count,
        rows=tokens * config.top_k_experts / count,
        threads=torch.get_num_threads(),
        repeats=repeats,
        machine=machine(),
        versions=versions(False),
        seconds={name: Spread.of(times) for name, times in seconds.items()},
        ratios={
            name: Spread.of([b / t for b, t in zip(seconds["bf16"], times, strict=True)])
            for name, times in seconds.items()
            if name != "bf16"
        },
    )
