"""Language models of random weights with a tokenizer that spells any text: they say nonsense, the same for a seed."""

from functools import lru_cache

from dgemma.config import FULL, SLIDING, GenerationConfig, ModelConfig
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
