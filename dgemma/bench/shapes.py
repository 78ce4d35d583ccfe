"""Networks to measure: sizes of no released model, with the proportions of one. Needs no torch."""

from dataclasses import dataclass, replace

from dgemma.checkpoints import release
from dgemma.config import FULL, SLIDING, ModelConfig, VisionConfig


@dataclass(frozen=True)
class Shape:
    """A network, its prompt's tokens, and the two step counts between which the time of a step is taken."""

    config: ModelConfig
    prompt: int
    steps: tuple[int, int]


# transformers builds no network without an image tower: the smallest there is, which no measurement runs.
_TOWER = VisionConfig.from_dict(
    {
        "model_type": "gemma4_vision",
        "hidden_size": 12,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 12,
        "global_head_dim": 12,
        "patch_size": 4,
        "pooling_kernel_size": 3,
        "position_embedding_size": 4,
        "standardize": False,
        "use_clipped_linears": False,
    }
)

_MID = ModelConfig(
    vocab_size=32_768,
    hidden_size=768,
    intermediate_size=1536,
    moe_intermediate_size=384,
    num_experts=16,
    top_k_experts=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=128,
    num_global_key_value_heads=2,
    global_head_dim=256,
    layer_types=(*[SLIDING] * 5, FULL) * 2,
    sliding_window=512,
    canvas_length=256,
    max_position_embeddings=8192,
    # Wide enough that random weights believe in something: with flat beliefs rounding alone would pick the tokens.
    initializer_range=0.1,
    image_token_id=32_768,
    vision=_TOWER,
)
_SMALL = replace(
    _MID,
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    moe_intermediate_size=32,
    num_experts=4,
    top_k_experts=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_global_key_value_heads=1,
    global_head_dim=32,
    layer_types=(SLIDING, FULL),
    sliding_window=24,
    canvas_length=32,
    initializer_range=0.3,
    image_token_id=512,
)
# The size of the models that ship in the package, which were trained from nothing.
_TRAIN = replace(
    _SMALL,
    vocab_size=1024,
    hidden_size=128,
    intermediate_size=256,
    moe_intermediate_size=96,
    num_experts=8,
    num_key_value_heads=4,
    head_dim=32,
    num_global_key_value_heads=4,
    layer_types=(SLIDING, SLIDING, FULL) * 2,
    sliding_window=256,
    canvas_length=96,
    initializer_range=0.02,
    image_token_id=1024,
)

SHAPES = {
    "26b": Shape(release.TEXT, prompt=256, steps=(1, 2)),
    "mid": Shape(_MID, prompt=256, steps=(2, 8)),
    "small": Shape(_SMALL, prompt=32, steps=(2, 22)),
    "train": Shape(_TRAIN, prompt=100, steps=(2, 8)),
}
