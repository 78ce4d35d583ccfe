"""`dgemma bench step`: one denoising step of any shape and format, by part, beside what this machine could do.

Random weights, made on the device. They never converge, so tokens a second are told for given numbers of steps.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any, cast

from dgemma.bench.decode import STEPS_A_CANVAS
from dgemma.bench.harness import Spread, cores, machine, versions
from dgemma.bench.shapes import SHAPES

if TYPE_CHECKING:
    from torch import Tensor

    from dgemma.model.network import DiffusionGemma

PLAIN = "bf16"


@dataclass(frozen=True)
class Part:
    """Bytes that must be read and operations that must be done; seconds taken, and at the machine's rates."""

    bytes: float
    flops: float
    seconds: float
    floor: float


@dataclass(frozen=True)
class Result:
    """bandwidth: bytes a second of a copy, read and written; rate: operations a second of a large bfloat16 product.

    step: of `batch` canvases behind prompts of `prompt` tokens each, as `denoise_step` takes it; parts are measured
    alone, one layer after the other.
    """

    shape: str
    format: str
    device: str
    threads: int
    prompt: int
    batch: int
    machine: str
    versions: dict[str, str]
    bandwidth: float
    rate: float
    weight_bytes: int
    peak_bytes: int | None
    prefill: float
    step: Spread
    floor: float
    parts: dict[str, Part]
    tokens_per_second: dict[int, float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def run(
    shape: str = "mid",
    format: str = PLAIN,
    device: str = "cpu",
    prompt: int = 1024,
    batch: int = 1,
    repeats: int = 10,
    threads: int | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Result:
    """format: bf16, or one that `dgemma quantize` knows. ValueError for a value that is not known or too small."""
    if shape not in SHAPES:
        raise ValueError(f"shape {shape!r} is not known; known: {', '.join(SHAPES)}")
    for name, count in (("prompt", prompt), ("batch", batch), ("repeats", repeats), ("threads", threads or 1)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, not {count}")
    import torch

    from dgemma.bench.random import random_model
    from dgemma.checkpoints.load import resolve_device

    threads = threads or cores()
    torch.set_num_threads(threads)
    at = str(resolve_device(device))
    progress("measuring the machine")
    bandwidth, rate = _bandwidth(at), _rate(at)
    progress(f"making random weights: {shape}, {format}")
    config = SHAPES[shape].config
    with torch.inference_mode():
        model = random_model(config, None if format == PLAIN else format, at)
        progress("prefill, steps and parts")
        bench = _Bench(model, prompt, batch)
        prefill = bench.prefill()
        step = Spread.of([bench.step() for _ in range(repeats + 3)][3:])
        alone = {name: bench.alone(part, repeats) for name, part in bench.parts().items()}
    needed = costs(model, prompt, batch)
    floor = {name: max(bytes / bandwidth, flops / rate) for name, (bytes, flops) in needed.items()}
    parts = {name: Part(*needed[name], alone[name], floor[name]) for name in needed}
    canvas = batch * config.canvas_length
    return Result(
        shape=shape,
        format=format,
        device=at,
        threads=threads,
        prompt=prompt,
        batch=batch,
        machine=torch.cuda.get_device_name(at) if at.startswith("cuda") else machine(),
        versions=versions(False),
        bandwidth=bandwidth,
        rate=rate,
        weight_bytes=sum(tensor.nbytes for tensor in model.state_dict().values()),
        peak_bytes=None if at == "cpu" else torch.accelerator.max_memory_allocated(at),
        prefill=prefill,
        step=step,
        floor=sum(floor.values()),
        parts=parts,
        tokens_per_second={n: canvas / (n * step.median + prefill * canvas / prompt) for n in STEPS_A_CANVAS},
    )


class _Bench:
    """A model with prompts encoded, and a canvas for each."""

    def __init__(self, model: "DiffusionGemma", prompt: int, batch: int):
        from dgemma.config import GenerationConfig
        from dgemma.decoding.denoise import Canvas
        from dgemma.decoding.noise import Noise

        config = model.config
        self.model, self.cache = model, model.new_cache(batch)
        self.prompts = [Noise(1 + b, config.vocab_size, prompt).canvas(0) for b in range(batch)]
        options = GenerationConfig(confidence_threshold=0, max_denoising_steps=10_000)
        noises = [Noise(b, config.vocab_size, config.canvas_length) for b in range(batch)]
        self.canvases = [Canvas.begin(model, b, 0, options, noise) for b, noise in enumerate(noises)]

    def prefill(self) -> float:
        """Seconds of the second time: the first sets up what is made on first use."""
        self.model.encode(self.prompts, self.model.new_cache(len(self.prompts)))
        return self._timed(lambda: self.model.encode(self.prompts, self.cache))

    def step(self) -> float:
        from dgemma.decoding.denoise import denoise_step

        return self._timed(lambda: denoise_step(self.model, self.cache, self.canvases))

    def parts(self) -> dict[str, "Callable[[Tensor], tuple[Tensor, ...]]"]:
        """Of final states [batch * canvas, hidden]; the names are those of `costs`."""
        import torch

        from dgemma.decoding.vocabulary import read
        from dgemma.model.network import Layer, make_spans

        model, cache, count = self.model, self.cache, len(self.prompts)
        canvas = model.config.canvas_length
        spans = make_spans([canvas] * count, cache.lengths, causal=False)
        rope = model._rotations(spans)
        layers = [layer for layer in model.layers if isinstance(layer, Layer)]
        temperature, uniform = torch.full((count,), 0.8), torch.full((count, canvas), 0.5)
        temperature, uniform = temperature.to(model.device), uniform.to(model.device)
        states = lambda x: x.view(count, canvas, -1)  # noqa: E731
        return {
            "attention": lambda x: tuple(layer.self_attn(x, spans, cache, rope[layer.kind]) for layer in layers),
            "dense": lambda x: tuple(layer.mlp(x) for layer in layers),
            "experts": lambda x: tuple(layer.experts(x, *layer.router(x)) for layer in layers),
            "vocabulary": lambda x: read(model.embed_tokens, states(x), temperature, uniform).parts,
        }

    def alone(self, part: "Callable[[Tensor], tuple[Tensor, ...]]", repeats: int) -> float:
        import torch

        from dgemma.kernels.replay import Replay

        rows = len(self.prompts) * self.model.config.canvas_length
        x = torch.randn(rows, self.model.config.hidden_size, device=self.model.device).to(self.model.dtype)
        replay = Replay()
        recorded = self.model.device.type == "cuda" and not self.model.waits
        call = (lambda: replay(part, x)) if recorded else (lambda: part(x))
        return Spread.of([self._timed(call) for _ in range(repeats + 2)][2:]).median

    def _timed(self, call: Callable[[], object]) -> float:
        _wait(self.model.device.type)
        started = perf_counter()
        call()
        _wait(self.model.device.type)
        return perf_counter() - started


def costs(model: "DiffusionGemma", prompt: int, batch: int, length: int = 0) -> dict[str, tuple[float, float]]:
    """Bytes and operations of each part of a step: every weight read once, of the experts those that are expected.

    length: tokens of each row, a canvas if 0. The weights may be on the meta device.
    """
    from dgemma.model.network import Layer

    config = model.config
    length = length or config.canvas_length
    rows = batch * length
    attention = dense = experts = [0.0, 0.0]
    for i, (kind, layer) in enumerate(zip(config.layer_types, cast(list[Layer], list(model.layers)), strict=True)):
        seen = prompt - config.first_reached(kind, prompt)
        size, own = config.head_size(i), config.kv_heads(i)
        elements = batch * seen * 2 * own * size
        scores = 4 * rows * (seen + length) * config.num_attention_heads * size
        projections = [module for name, module in layer.self_attn.named_children() if name.endswith("_proj")]
        attention = _sum(attention, _bytes(projections) + 2 * elements, 2 * rows * _elements(projections) + scores)
        dense = _sum(dense, _bytes([layer.mlp]), 2 * rows * _elements([layer.mlp]))
        used = 1 - (1 - config.top_k_experts / config.num_experts) ** rows
        share = config.top_k_experts / config.num_experts
        stacks = [layer.experts]
        experts = _sum(experts, used * _bytes(stacks), 2 * rows * share * _elements(stacks))
    head = _bytes([model.embed_tokens]), 2 * rows * config.vocab_size * config.hidden_size
    return {
        "attention": (attention[0], attention[1]),
        "dense": (dense[0], dense[1]),
        "experts": (experts[0], experts[1]),
        "vocabulary": (2 * head[0], 2 * head[1]),  # once for the logits, once for the expected embedding
    }


def _sum(total: Sequence[float], bytes: float, flops: float) -> list[float]:
    return [total[0] + bytes, total[1] + flops]


def _bytes(modules: Sequence[Any]) -> float:
    return sum(tensor.nbytes for module in modules for tensor in module.state_dict().values())


def _elements(modules: Sequence[Any]) -> float:
    """Of the matrices, packed ones counted as what they stand for."""
    from dgemma.quant.packed import Packed

    count = 0
    for module in modules:
        for each in module.modules():
            own = [each] if isinstance(each, Packed) else each.parameters(recurse=False)
            count += sum(matrix.shape.numel() for matrix in own)
    return count


def _bandwidth(device: str) -> float:
    """Bytes read and written a second by a copy that no cache holds."""
    import torch

    source = torch.ones((1 << 31 if device != "cpu" else 1 << 28) // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best(lambda: target.copy_(source), device)


def _rate(device: str) -> float:
    """Operations a second of a product of large bfloat16 matrices of random numbers."""
    import torch

    size = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    return 2 * size**3 / _best(lambda: a @ b, device)


def _best(call: Callable[[], object], device: str) -> float:
    times = []
    for _ in range(8):
        _wait(device)
        started = perf_counter()
        call()
        _wait(device)
        times.append(perf_counter() - started)
    return Spread.of(times[2:]).median


def _wait(device: str) -> None:
    import torch

    if device != "cpu":
        torch.accelerator.synchronize(device)
