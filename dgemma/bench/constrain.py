"""`dgemma bench constrain`: what keeping to a tool's schema costs, beside the same steps without it."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from dgemma import embedded
from dgemma.bench.decode import DTYPES, check
from dgemma.bench.harness import Spread, cores, machine, versions
from dgemma.bench.shapes import SHAPES
from dgemma.config import GenerationConfig

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {
                "location": {"type": "string"},
                "unit": {"enum": ["celsius", "fahrenheit"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 14},
            },
            "required": ["location"],
        },
    },
}


@dataclass(frozen=True)
class Result:
    """cold: the first automaton, with what is read once from a tokenizer; new: another schema's; warm: the first again.

    Seconds. states, classes: of the automaton; free, bound: a step without and with it, seconds; ratio: pair by pair.
    """

    shape: str
    dtype: str
    threads: int
    repeats: int
    machine: str
    versions: dict[str, str]
    vocabulary: int
    states: int
    classes: int
    cold: float
    new: float
    warm: float
    free: Spread
    bound: Spread
    ratio: Spread

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def run(
    tokenizer: Path | None = None,
    shape: str = "mid",
    dtype: str = "bf16",
    repeats: int = 15,
    threads: int | None = None,
    device: str = "cpu",
    progress: Callable[[str], None] = lambda line: None,
) -> Result:
    """Random weights of a shape, steps with and without the automaton of TOOL in turn. tokenizer: a directory."""
    check(shape, dtype, repeats, threads)
    import torch

    from dgemma.checkpoints.load import resolve_device
    from dgemma.constraints.compile import compiled
    from dgemma.constraints.tools import tool_calls
    from dgemma.decoding import blocks
    from dgemma.decoding.denoise import denoise_step
    from dgemma.decoding.noise import Noise
    from dgemma.decoding.pins import UNKNOWN, Known
    from dgemma.model.network import DiffusionGemma
    from dgemma.text.tokenizer import Tokenizer

    torch.set_num_threads(threads or cores())
    words = Tokenizer.from_directory(tokenizer or embedded.HERE / "tiny")
    size, other = SHAPES[shape].config.vocab_size, {"type": "array", "items": {"type": "string"}}
    progress("automata")
    seconds = []
    for constraint in (node := tool_calls([TOOL]), other, node):
        started = perf_counter()
        compiled(constraint, words, max(len(words), size), (1,), 0)
        seconds.append(perf_counter() - started)
    cold, new, warm = seconds
    automaton = compiled(node, words, size, (1,), 0)

    progress(f"random weights: {shape}, {dtype}")
    model = DiffusionGemma(SHAPES[shape].config).init_weights(0)
    model = model.to(getattr(torch, DTYPES[dtype])).to(resolve_device(device)).eval()
    prompt = torch.zeros(SHAPES[shape].prompt, dtype=torch.int64)
    options = GenerationConfig(max_new_tokens=1024, max_denoising_steps=repeats + 2, confidence_threshold=0.0)
    noise = Noise(0, size, model.config.canvas_length)
    times: dict[str, list[float]] = {"free": [], "bound": []}
    with torch.inference_mode():
        cache = model.new_cache(1)
        model.encode([prompt], cache)
        knowns = {"free": UNKNOWN, "bound": Known(constraint=automaton)}
        canvases = {
            name: blocks.begin(model, 0, blocks.Request(prompt, options, noise, known))
            for name, known in knowns.items()
        }
        for turn in range(repeats + 1):
            progress(f"steps, {turn} of {repeats}")
            for name, canvas in canvases.items():
                started = perf_counter()
                denoise_step(model, cache, [canvas])
                times[name].append(perf_counter() - started)
    free, bound = times["free"][1:], times["bound"][1:]
    ratio = Spread.of([b / f for f, b in zip(free, bound, strict=True)])
    states, classes = automaton.table.shape
    about = (shape, dtype, torch.get_num_threads(), repeats, machine(), versions(False), len(words), states, classes)
    return Result(*about, cold, new, warm, Spread.of(free), Spread.of(bound), ratio)
