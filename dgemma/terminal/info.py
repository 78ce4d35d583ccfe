"""`dgemma info`: what a checkpoint is and needs, from its config and its headers. Needs no torch."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from dgemma.checkpoints.inspect import (
    CheckpointInfo,
    attention_bytes,
    conversation_bytes,
    count_parameters,
    formats_of,
    inspect,
    inspect_gguf,
    vocabulary_bytes,
    weight_bytes,
)
from dgemma.checkpoints.layouts import Scheme, read_layout
from dgemma.checkpoints.source import GGUF
from dgemma.config import FULL, SLIDING, ModelConfig, read_json

CACHES = {"float32": (4, 0), "bfloat16": (2, 0), "8 bits": (1, 2)}
"""Bytes of an element of a key or value, and of its scale."""
CONTEXTS = (1, 8, 32, 256)
"""In units of 1024 tokens."""
CARDS = (16, 24, 32, 48, 80, 141)
"""Memory of common cards in GB of 10^9 bytes; what they have beyond that is left to the driver."""
KINDS = {"fp8": "FP8", "int8": "int8", "int4": "int4", "nvfp4": "NVFP4"}


def describe(path: Path) -> Iterator[str]:
    """Lines about the model in a directory or a GGUF file. Raises OSError or ValueError that names the file."""
    config, stored, format = _gguf(path) if path.suffix == GGUF else _directory(path)
    parts = count_parameters(config)
    total = sum(parts.values())
    idle = parts["experts"] * (config.num_experts - config.top_k_experts) // config.num_experts
    kinds = config.layer_types

    yield str(path)
    yield _line("format", format)
    yield _line("parameters", f"{_count(total)}, {_count(total - idle - parts['vision'])} of them used by a text token")
    yield from (_part(part, number, stored) for part, number in parts.items() if number)
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
    yield "memory of the cache, a conversation"
    for name, size in CACHES.items():
        a_token = config.cache_bytes_per_token(*size)
        sizes = f"{_size(a_token[FULL])} full, {_size(a_token[SLIDING])} sliding"
        yield _line(f"  in {name}, a token", sizes)
        held = (
            f"{_size(config.cache_bytes(1024 * k, *size))} at {k}K"
            for k in CONTEXTS
            if 1024 * k <= config.max_position_embeddings
        )
        yield _line("    of a context", ", ".join(held))
    yield from _cards(config, stored)


def _directory(directory: Path) -> tuple[ModelConfig, CheckpointInfo | None, str]:
    config = ModelConfig.from_file(directory / "config.json")
    stored = inspect(directory) if any(directory.glob("*.safetensors")) else None
    return config, stored, _format(directory)


def _gguf(path: Path) -> tuple[ModelConfig, CheckpointInfo, str]:
    from dgemma.checkpoints.gguf_header import read_gguf_header  # needs numpy

    header = read_gguf_header(path)
    (most, count), *others = Counter(tensor.type for tensor in header.tensors.values()).most_common()
    told = "".join(f", {type} {number}" for type, number in others)
    return header.config, inspect_gguf(header), f"GGUF: {most} {count} tensors{told}"


def _format(directory: Path) -> str:
    try:
        layout = read_layout(directory, read_json(directory / "config.json"))
    except ValueError as error:
        return str(error)
    if layout is None:
        return "plain"
    tool = "compressed-tensors" if all(scheme.divide for scheme in layout.schemes) else "modelopt"
    return ", ".join((tool, *dict.fromkeys(map(_scheme, layout.schemes))))


def _scheme(scheme: Scheme) -> str:
    scales = f"in groups of {scheme.group}" if scheme.group else "by rows"
    return f"{KINDS[scheme.kind]} {scales}{' with int8 activations' if scheme.activations else ''}"


def _part(part: str, parameters: int, stored: CheckpointInfo | None) -> str:
    count = _count(parameters)
    if not stored:
        return _line(f"  {part}", count)
    held = stored.bytes_by_part[part]
    return _line(f"  {part}", f"{count:>9} {_size(held):>12} {8 * held / parameters:>6.2f} bits a weight")


def _cards(config: ModelConfig, stored: CheckpointInfo | None) -> Iterator[str]:
    """A table: by the format of the weights, the longest context that a card holds beside them."""
    contexts = [1024 * k for k in CONTEXTS[1:] if 1024 * k <= config.max_position_embeddings]
    contexts = contexts or [config.max_position_embeddings]
    needed = {tokens: conversation_bytes(config, tokens) for tokens in contexts}
    weights = {"as stored": sum(stored.bytes_by_part.values())} if stored else {}
    weights |= {f"in {format}": weight_bytes(config, format) for format in formats_of(config)}

    yield "the longest context that fits beside the weights"
    yield _line("  on a card of", "".join(f"{cell:>9}" for cell in ("", "", *(f"{card} GB" for card in CARDS))))
    for name, size in weights.items():
        longest = (max((t for t in contexts if size + needed[t] <= card * 10**9), default=0) for card in CARDS)
        yield _line(f"  {name}", f"{_size(size):>18}" + "".join(f"{_tokens(tokens):>9}" for tokens in longest))
    most = contexts[-1]
    yield (
        f"  counted: the cache and its copy for a step in bfloat16, {_size(vocabulary_bytes(config))} of scores over "
        f"the vocabulary, {_size(attention_bytes(config, most))} in attention at {_tokens(most)}"
    )


def _tokens(number: int) -> str:
    return f"{number // 1024}K" if number >= 1024 else str(number) if number else "–"


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
