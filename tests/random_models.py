"""Language models of random weights with a tokenizer that spells any text: they say nonsense, the same for a seed."""

from dataclasses import replace
from functools import lru_cache

from tokenizers import AddedToken

from dgemma.config import FULL, SLIDING, GenerationConfig, ModelConfig, VisionConfig
from dgemma.language_model import LanguageModel
from dgemma.model.network import DiffusionGemma
from dgemma.text.chat import ChatTemplate
from dgemma.text.small import SPECIAL, bpe_tokenizer
from dgemma.text.tokenizer import Tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|turn>{{ m.role }}\n{{ m.content }}<turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn>model\n{% endif %}"
)


@lru_cache
def random_lm(canvas: int = 16, chat: bool = True) -> LanguageModel:
    """Two layers, a vocabulary of 448 with bytes and a few merged words."""
    tokenizer = Tokenizer(bpe_tokenizer(["the cat and the dog and the bird sat and sang"] * 9, 448))
    config = ModelConfig(
        vocab_size=448,
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=8,
        num_experts=2,
        top_k_experts=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_global_key_value_heads=1,
        global_head_dim=8,
        layer_types=(SLIDING, FULL),
        sliding_window=32,
        canvas_length=canvas,
        max_position_embeddings=2000,
        dtype="float32",
        eos_token_id=(SPECIAL.index("<eos>"), SPECIAL.index("<turn|>")),
        initializer_range=0.3,
    )
    defaults = GenerationConfig(max_new_tokens=40, max_denoising_steps=6, eos_token_id=config.eos_token_id)
    model = DiffusionGemma(config).init_weights(0).eval().requires_grad_(False)
    return LanguageModel("random", model, tokenizer, ChatTemplate(TEMPLATE) if chat else None, defaults)


IMAGE = ("<|image|>", "<|image>", "<image|>", "<|video|>")
PARTS = (
    "{{ bos_token }}{% for m in messages %}<|turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{{ part.text if part.type == 'text' else '<|' ~ part.type ~ '|>' }}{% endfor %}{% endif %}<turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn>model\n{% endif %}"
)


@lru_cache
def seeing_lm(canvas: int = 16) -> LanguageModel:
    """`random_lm` with a tower of 4 × 4 pixels a patch and 2 × 2 patches a soft token, and tokens for its images.

    What it says depends on what it is shown.
    """
    blind = random_lm(canvas)
    tokenizer = Tokenizer(bpe_tokenizer(["the cat and the dog and the bird sat and sang"] * 9, 448))
    tokenizer.backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in IMAGE])
    tokenizer = Tokenizer(tokenizer.backend)
    vision = VisionConfig.from_dict(
        {
            "model_type": "gemma4_vision",
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "global_head_dim": 8,
            "patch_size": 4,
            "pooling_kernel_size": 2,
            "position_embedding_size": 2400,
            "standardize": True,
            "use_clipped_linears": False,
        }
    )
    image, begin, end = (tokenizer.id(token) for token in IMAGE[:3])
    config = replace(
        blind.model.config,
        vocab_size=len(tokenizer),
        vision=vision,
        image_token_id=image,
        boi_token_id=begin,
        eoi_token_id=end,
        vision_soft_tokens_per_image=70,
        sliding_window=128,
        max_position_embeddings=8000,
    )
    model = DiffusionGemma(config).init_weights(0).eval().requires_grad_(False)
    return LanguageModel("seeing", model, tokenizer, ChatTemplate(PARTS), blind.defaults)
