"""Facts about google/diffusiongemma-26B-A4B-it that files can be held against. Needs no torch."""

from dataclasses import dataclass, replace

from dgemma.config import FULL, SLIDING, ModelConfig, VisionConfig

TEXT = ModelConfig(
    vocab_size=262_144,
    hidden_size=2816,
    intermediate_size=2112,
    moe_intermediate_size=704,
    num_experts=128,
    top_k_experts=8,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=256,
    num_global_key_value_heads=2,
    global_head_dim=512,
    layer_types=(*(SLIDING,) * 5, FULL) * 5,
    sliding_window=1024,
)
"""The text network: the released config.json without its vision tower and its tokens of images and ends."""

VISION = VisionConfig.from_dict(
    {
        "model_type": "gemma4_vision",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 72,
        "global_head_dim": 72,
        "patch_size": 16,
        "pooling_kernel_size": 3,
        "position_embedding_size": 10_240,
        "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"},
        "standardize": True,
        "use_clipped_linears": False,
    }
)
"""The image tower."""

TOKENIZER = "cc8d3a0ce36466ccc1278bf987df5f71db1719b9ca6b4118264f45cb627bfe0f"
TEMPLATES = {
    "36e3a42e5cf14cd0020e72d92e1fdd9970f59b82170e421f0cbe1bb42bead3f0": "first",
    "2f1b4d75d067bae3fe44e676721c7f077d243bc007156cb9c2f8b5836613d082": "second",
}
"""SHA-256 of the released tokenizer.json and of the two versions of chat_template.jinja."""


def is_release(config: ModelConfig) -> bool:
    """Whether a config describes the released text network; dtype and tokens of images and ends may differ."""
    own = ("dtype", "initializer_range", "eos_token_id", "image_token_id", "boi_token_id", "eoi_token_id")
    same = {name: getattr(TEXT, name) for name in (*own, "vision", "vision_soft_tokens_per_image")}
    return replace(config, **same) == TEXT


@dataclass(frozen=True)
class Golden:
    """Logits of a first denoising step: of the canvas 0, 1, 2, … behind a prompt, from the first position and token
    on."""

    prompt: tuple[int, ...]
    logits: tuple[tuple[float, ...], ...]


GOLDEN = Golden(
    prompt=(2, 105, 2364, 107, 6974, 496, 1440, 20494, 1003, 23613, 236761, 106, 107, 105, 4368, 107, 100, 45518)
    + (107, 101),
    logits=(
        (4.1299, 20.6666, 6.7571, 4.1605, 13.1157, 3.5921, 3.4688, 3.869, 3.1447, 2.4787, 4.436, 4.7716),
        (3.2065, 22.5268, 7.7865, 2.7113, 14.7328, 4.5582, 4.1605, 3.0364, 3.915, 1.5845, 4.5276, 4.4666),
        (4.7716, 23.5508, 5.801, 3.6536, 15.6618, 4.1912, 5.015, 2.9281, 4.5582, 2.9281, 5.2879, 7.8738),
        (4.6497, 24.279, 6.0113, 3.669, 15.5707, 3.1756, 5.2577, 3.4071, 4.9542, 4.283, 5.7107, 8.1061),
        (5.1667, 24.279, 6.43, 3.3608, 16.8958, 4.4971, 5.7709, 4.4054, 5.2274, 4.1299, 7.0531, 8.6821),
        (5.2879, 24.3647, 7.5821, 3.5304, 17.3176, 4.4971, 5.3182, 4.4054, 4.9846, 3.8843, 7.4649, 8.3373),
        (5.1061, 24.279, 7.171, 3.3454, 16.5512, 3.9611, 4.0992, 4.2524, 4.3442, 4.4666, 5.7107, 8.2796),
        (6.8164, 24.1922, 8.5675, 5.3787, 17.1501, 5.801, 5.8612, 4.2524, 6.3405, 4.4971, 7.6113, 9.3643),
        (6.994, 24.4492, 8.9676, 5.3485, 16.8103, 5.7709, 4.9542, 4.4971, 5.6806, 4.6802, 6.9349, 8.8536),
        (7.932, 23.833, 7.8156, 6.5194, 17.7293, 5.9813, 5.8311, 5.4392, 6.6086, 5.2879, 7.6698, 9.8689),
    ),
)
"""Published by transformers (its integration test of the text model), computed in bfloat16 on a GPU."""
