"""A small network of both kinds of layers whose pages and window are shorter than a prompt."""

from dgemma.config import FULL, SLIDING, ModelConfig

PAGED = ModelConfig(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    moe_intermediate_size=8,
    num_experts=3,
    top_k_experts=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=8,
    num_global_key_value_heads=1,
    global_head_dim=16,
    layer_types=(SLIDING, SLIDING, FULL, SLIDING, FULL),
    sliding_window=11,
    canvas_length=4,
    max_position_embeddings=4096,
    dtype="float32",
)
