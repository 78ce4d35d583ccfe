"""What a checkpoint holds, told from its headers, and what its config asks for. Needs no torch, reads no weights."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dgemma.checkpoints.headers import stored_tensors
from dgemma.checkpoints.names import released_name, stored_name
from dgemma.config import FULL, SLIDING, ModelConfig, VisionConfig

if TYPE_CHECKING:
    from dgemma.checkpoints.gguf_header import Gguf

_PARTS = (
    ("vision", r"\.(vision_tower|embed_vision)\."),
    ("embedding", r"\.embed_tokens\."),
    ("self-conditioning", r"\.self_conditioning\."),
    ("attention", r"\.self_attn\."),
    ("dense MLP", r"\.mlp\."),
    ("router", r"\.router\."),
    ("experts", r"\.experts\."),
    ("norms and scalars", r""),
)
PARTS = tuple(part for part, _ in _PARTS)
LARGE = ("attention", "dense MLP", "experts")
"""Parts whose matrices `quant.quantize` quantises."""
GROUPS = {"BF16": 1, "FP8": 1, "INT4": 32, "NVFP4": 16}
"""Formats that weights may be held in, and the columns of which each needs a multiple."""
GROUP_BYTES, GROUP_ROWS = 16 << 20, 128
"""Rows of scores over the vocabulary held at once: those of `decoding.vocabulary`, which needs torch."""
SCORES_LIMIT = 1 << 26
"""Attention's scores held at once: that of `model.attention`."""


@dataclass(frozen=True)
class CheckpointInfo:
    """Both by-part counts take tied twins once and include the codes and scales of quantised layouts:
    `count_parameters` of the config is the size of the network itself."""

    tensors: int
    shards: tuple[str, ...]
    bytes_by_dtype: dict[str, int]
    elements: dict[str, int]
    bytes_by_part: dict[str, int]

    @property
    def bytes(self) -> int:
        return sum(self.bytes_by_dtype.values())


def inspect(directory: str | Path) -> CheckpointInfo:
    """Raises OSError or ValueError as `stored_tensors` does."""
    stored = stored_tensors(Path(directory))
    sizes: Counter[str] = Counter()
    elements, part_bytes = dict.fromkeys(PARTS, 0), dict.fromkeys(PARTS, 0)
    for tensor in stored.values():
        sizes[tensor.dtype] += tensor.bytes
    read = {released_name(name): tensor for name, tensor in stored.items()}
    read |= {name: stored[name] for name in read if name in stored}  # before its twin, as in loading
    for name, tensor in read.items():
        elements[part_of(name)] += math.prod(tensor.shape)
        part_bytes[part_of(name)] += tensor.bytes
    shards = sorted({tensor.file.name for tensor in stored.values()})
    return CheckpointInfo(len(stored), tuple(shards), dict(sizes.most_common()), elements, part_bytes)


def inspect_gguf(header: "Gguf") -> CheckpointInfo:
    """The same of a GGUF file, with ggml's types; what is not the network's belongs to no part."""
    from dgemma.checkpoints.gguf_header import own_name  # needs numpy

    sizes: Counter[str] = Counter()
    elements, part_bytes = dict.fromkeys(PARTS, 0), dict.fromkeys(PARTS, 0)
    for name, tensor in header.tensors.items():
        sizes[tensor.type] += tensor.data.nbytes
        if own := own_name(name):
            elements[part_of(stored_name(own))] += math.prod(tensor.shape)
            part_bytes[part_of(stored_name(own))] += tensor.data.nbytes
    files = sorted({tensor.file.name for tensor in header.tensors.values()})
    return CheckpointInfo(len(header.tensors), tuple(files), dict(sizes.most_common()), elements, part_bytes)


def part_of(name: str) -> str:
    """The part of the network that a tensor of this released name belongs to."""
    return next(part for part, pattern in _PARTS if re.search(pattern, name))


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters by part of the network that a config describes; buffers that a checkpoint stores count too."""
    hidden, layers = config.hidden_size, config.num_hidden_layers
    large = {part: sum(rows * columns for rows, columns in shapes) for part, shapes in large_matrices(config).items()}
    return {
        "vision": _vision(config.vision, hidden) if config.vision else 0,
        "embedding": config.vocab_size * hidden,
        "self-conditioning": 3 * hidden * config.intermediate_size + hidden,
        "attention": large["attention"] + sum(2 * config.head_size(layer) for layer in range(layers)),
        "dense MLP": large["dense MLP"],
        "router": layers * (hidden * config.num_experts + hidden + config.num_experts),
        "experts": large["experts"],
        "norms and scalars": layers * (7 * hidden + 2) + hidden,
    }


def large_matrices(config: ModelConfig) -> dict[str, list[tuple[int, int]]]:
    """Rows and columns of the matrices of the LARGE parts; those of equal columns may be told as one."""
    hidden, layers = config.hidden_size, config.num_hidden_layers
    attention = []
    for layer, kind in enumerate(config.layer_types):
        size = config.head_size(layer)
        queries, keys = size * config.num_attention_heads, size * config.kv_heads(layer)
        attention += [(queries + (2 if kind == SLIDING else 1) * keys, hidden), (hidden, queries)]
    experts = layers * config.num_experts
    return {
        "attention": attention,
        "dense MLP": [
            (layers * 2 * config.intermediate_size, hidden),
            (layers * hidden, config.intermediate_size),
        ],
        "experts": [
            (experts * 2 * config.moe_intermediate_size, hidden),
            (experts * hidden, config.moe_intermediate_size),
        ],
    }


def formats_of(config: ModelConfig) -> list[str]:
    """Those of GROUPS whose groups divide the columns of the experts."""
    columns = {columns for _, columns in large_matrices(config)["experts"]}
    return [name for name, group in GROUPS.items() if not any(count % group for count in columns)]


def weight_bytes(config: ModelConfig, format: str, parts: Sequence[str] = LARGE) -> int:
    """Memory of the weights with the large matrices of these parts in a format, scales included, the rest in BF16.

    In four bits are the experts alone: the other parts get eight, as `quant.quantize` does it.
    """
    total = 2 * sum(count_parameters(config).values())
    for part in parts:
        own = "FP8" if format in ("INT4", "NVFP4") and part != "experts" else format
        total += sum(rows * (_row_bytes(own, columns) - 2 * columns) for rows, columns in large_matrices(config)[part])
    return total


def _row_bytes(format: str, columns: int) -> int:
    match format:
        case "FP8":
            return columns + 2  # the row's scale in bfloat16
        case "INT4":
            return columns // 2 + 2 * (columns // GROUPS[format])
        case "NVFP4":
            return columns // 2 + columns // GROUPS[format] + 4  # scales in e4m3, and the row's float32 factor
    return 2 * columns


def vocabulary_bytes(config: ModelConfig) -> int:
    """BF16 scores of a group of a canvas's rows over the vocabulary: all that a denoising step holds of its logits."""
    row = 2 * config.vocab_size
    return row * min(config.canvas_length, max(GROUP_ROWS, GROUP_BYTES // row))


def attention_bytes(config: ModelConfig, tokens: int) -> int:
    """What a full layer holds while a canvas reads so many cached tokens: keys and values once more, scores thrice."""
    layers = config.layer_types.count(FULL)
    scores = min(SCORES_LIMIT, config.canvas_length * config.num_attention_heads * tokens)
    return tokens * config.cache_bytes_per_token()[FULL] // layers + 3 * 2 * scores


def conversation_bytes(config: ModelConfig, tokens: int) -> int:
    """Memory beside the weights, in BF16: the cache's pages, their gathered copy for a step, and activations."""
    return 2 * config.cache_bytes(tokens) + vocabulary_bytes(config) + attention_bytes(config, tokens)


def _vision(vision: VisionConfig, text_hidden: int) -> int:
    hidden = vision.hidden_size
    layer = hidden * (4 * vision.num_attention_heads * vision.head_dim + 3 * vision.intermediate_size + 4)
    layer += 2 * vision.head_dim + (7 * 4 if vision.use_clipped_linears else 0)
    patches = hidden * (3 * vision.patch_size**2 + 2 * vision.position_embedding_size)
    return vision.num_hidden_layers * layer + patches + hidden * text_hidden + (2 * hidden if vision.standardize else 0)
