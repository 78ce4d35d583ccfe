"""`dgemma info`: what a checkpoint is and needs, from its config and its headers. Needs no torch."""

from collections.abc import Iterator
from pathlib import Path

from dgemma.checkpoints.inspect import count_parameters, inspect
from dgemma.config import FULL, SLIDING, ModelConfig

ITEMSIZES = {"float32": 4, "bfloat16": 2}
CONTEXTS = (1, 8, 32, 256)
"""In units of 1024 tokens."""


def describe(directory: Path) -> Iterator[str]:
    """Lines about the model in a directory. Raises OSError or ValueError that names the file."""
    config = ModelConfig.from_file(directory / "config.json")
    stored = inspect(directory) if any(directory.glob("*.safetensors")) else None
    parts = count_parameters(config)
    total = sum(parts.values())
    idle = parts["experts"] * (config.num_experts - config.top_k_experts) // config.num_experts
    kinds = config.layer_types

    yield str(directory)
    yield _line("parameters", f"{_count(total)}, {_count(total - idle - parts['vision'])} of them used by a text token")
    yield from (_line(f"  {part}", _count(number)) for part, number in parts.items() if number)
    layers = f"{len(kinds)}: {kinds.count(SLIDING)} sliding (window {config.sliding_window}), {kinds.count(FULL)} full"
    yield _line("layers", layers)
    yield _line("experts", f"{config.num_experts} a layer, {config.top_k_experts} speak")
    yield _line("hidden size", f"{config.hidden_size}")
    yield _line("vocabulary", f"{config.vocab_size:,} tokens")
    yield _line("canvas", f"{config.canvas_length} tokens")
    yield _line("context", f"{config.max_position_embeddings:,} tokens")
    yield ""
    if stored:
        yield _line("file", f"{stored.tensors} tensors in {len(stored.shards)} file(s), {_size(stored.bytes)}")
        yield from (_line(f"  as {dtype}", _size(number)) for dtype, number in stored.bytes_by_dtype.items())
    else:
        yield _line("file", "the weights are not on this machine")
    yield "memory of the weights"
    yield from (_line(f"  in {dtype}", _size(total * size)) for dtype, size in ITEMSIZES.items())
    yield "memory of the cache, a conversation"
    for dtype, size in ITEMSIZES.items():
        a_token = config.cache_bytes_per_token(size)
        sizes = f"{_size(a_token[FULL])} full, {_size(a_token[SLIDING])} sliding"
        yield _line(f"  in {dtype}, a token", sizes)
        held = (
            f"{_size(config.cache_bytes(1024 * k, size))} at {k}K"
            for k in CONTEXTS
            if 1024 * k <= config.max_position_embeddings
        )
        yield _line("    of a context", ", ".join(held))


def _line(name: str, value: str) -> str:
    return f"{name:<24}{value}"


def _count(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def _size(number: int) -> str:
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if number >= 1 << shift:
            return f"{number / (1 << shift):.2f} {unit}"
    return f"{number} B"
