"""What a checkpoint holds, told from its headers, and what its config asks for. Needs no torch, reads no weights."""

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from dgemma.checkpoints.headers import stored_tensors
from dgemma.checkpoints.names import released_name
from dgemma.config import SLIDING, ModelConfig, VisionConfig

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


@dataclass(frozen=True)
class CheckpointInfo:
    """`elements` by part count what is stored, tied twins once: of quantised layouts that includes packed codes and
    scales, so `count_parameters` of the config is the size of the network itself."""

    tensors: int
    shards: tuple[str, ...]
    bytes_by_dtype: dict[str, int]
    elements: dict[str, int]

    @property
    def bytes(self) -> int:
        return sum(self.bytes_by_dtype.values())


def inspect(directory: str | Path) -> CheckpointInfo:
    """Raises OSError or ValueError as `stored_tensors` does."""
    stored = stored_tensors(Path(directory))
    sizes: Counter[str] = Counter()
    elements = dict.fromkeys(PARTS, 0)
    for tensor in stored.values():
        sizes[tensor.dtype] += tensor.bytes
    for name, shape in {released_name(name): tensor.shape for name, tensor in stored.items()}.items():
        elements[part_of(name)] += math.prod(shape)
    shards = sorted({tensor.file.name for tensor in stored.values()})
    return CheckpointInfo(len(stored), tuple(shards), dict(sizes.most_common()), elements)


def part_of(name: str) -> str:
    """The part of the network that a tensor of this released name belongs to."""
    return next(part for part, pattern in _PARTS if re.search(pattern, name))


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters by part of the network that a config describes; buffers that a checkpoint stores count too."""
    hidden, layers = config.hidden_size, config.num_hidden_layers
    attention = 0
    for layer, kind in enumerate(config.layer_types):
        size = config.head_size(layer)
        projections = 2 * config.num_attention_heads + (2 if kind == SLIDING else 1) * config.kv_heads(layer)
        attention += hidden * size * projections + 2 * size
    mlp = 3 * hidden * config.intermediate_size
    return {
        "vision": _vision(config.vision, hidden) if config.vision else 0,
        "embedding": config.vocab_size * hidden,
        "self-conditioning": mlp + hidden,
        "attention": attention,
        "dense MLP": layers * mlp,
        "router": layers * (hidden * config.num_experts + hidden + config.num_experts),
        "experts": layers * config.num_experts * 3 * hidden * config.moe_intermediate_size,
        "norms and scalars": layers * (7 * hidden + 2) + hidden,
    }


def _vision(vision: VisionConfig, text_hidden: int) -> int:
    hidden = vision.hidden_size
    layer = hidden * (4 * vision.num_attention_heads * vision.head_dim + 3 * vision.intermediate_size + 4)
    layer += 2 * vision.head_dim + (7 * 4 if vision.use_clipped_linears else 0)
    patches = hidden * (3 * vision.patch_size**2 + 2 * vision.position_embedding_size)
    return vision.num_hidden_layers * layer + patches + hidden * text_hidden + (2 * hidden if vision.standardize else 0)
