"""A small random model, and Sudoku bases that need no minute to be made."""

from pathlib import Path

import numpy as np
import pytest

from dgemma import embedded
from dgemma.config import FULL, SLIDING, GenerationConfig, ModelConfig
from dgemma.evals.tasks import sudoku
from dgemma.language_model import LanguageModel
from dgemma.model.network import DiffusionGemma
from dgemma.text.chat import ChatTemplate
from dgemma.text.small import character_tokenizer
from dgemma.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def random_lm() -> LanguageModel:
    """Two layers, random weights, a vocabulary of characters: it says nonsense, the same for the same seed."""
    config = ModelConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_experts=4,
        top_k_experts=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,
        num_global_key_value_heads=1,
        global_head_dim=32,
        layer_types=(SLIDING, FULL),
        sliding_window=64,
        canvas_length=24,
        max_position_embeddings=256,
        dtype="float32",
        eos_token_id=(1, 6),
    )
    model = DiffusionGemma(config).init_weights(0)
    template = ChatTemplate.from_directory(embedded.HERE / "sudoku")
    defaults = GenerationConfig(max_new_tokens=40, max_denoising_steps=3, eos_token_id=(1, 6))
    return LanguageModel("random", model, Tokenizer(character_tokenizer()), template, defaults)


@pytest.fixture(scope="session")
def few_bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder whose chunks repeat two bases, one held out and one for training."""
    folder = tmp_path_factory.mktemp("cache")
    (folder / "dgemma").mkdir()
    for number, chunks in ((0, (0, 1)), (sudoku.HELD_OUT_BASES, (2,))):
        solution, removal, key = sudoku._make(number)
        assert sum(r == 255 for r in removal) <= 25, "choose a base that reaches every level"
        for chunk in chunks:
            np.savez(
                folder / "dgemma" / f"sudoku-{sudoku.FIRST_SEED}-{sudoku.CHUNK}-{chunk}.npz",
                solution=np.array([solution] * sudoku.CHUNK, np.uint8),
                removal=np.array([removal] * sudoku.CHUNK, np.uint8),
                keys=np.array([key] * sudoku.CHUNK),
            )
    return folder
