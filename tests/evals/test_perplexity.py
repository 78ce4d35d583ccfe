"""How likely texts are to a judge: this project's causal mode, and a causal model of transformers."""

from math import exp, log
from pathlib import Path
from typing import Any

import pytest
import torch

from dgemma.evals.perplexity import judgement, load_judge, perplexity
from dgemma.language_model import LanguageModel
from dgemma.text.small import character_tokenizer

TEXTS = ["a short text", "another one, längere"]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """A tiny random GPT-2 and its tokenizer, in a directory."""
    transformers = pytest.importorskip("transformers")
    directory = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=128, n_positions=64, n_embd=16, n_layer=1, n_head=2, initializer_range=0.5)
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=character_tokenizer(), bos_token="<bos>", unk_token="<unk>"
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory, model.eval(), tokenizer


def test_a_judge_of_transformers_equals_its_own_loss(gpt2: tuple[Path, Any, Any]) -> None:
    directory, model, tokenizer = gpt2
    nats = tokens = 0.0
    for text in TEXTS:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]])
        count = ids.shape[1] - 1
        nats += model(ids, labels=ids).loss.item() * count  # the model's own mean over all tokens but the first
        tokens += count
    found = judgement([*TEXTS, ""], load_judge(f"hf:{directory}", device="cpu"))
    assert found.perplexity == pytest.approx(exp(nats / tokens), rel=1e-4)
    assert found.bits_per_byte == pytest.approx(nats / log(2) / (12 + 21), rel=1e-4)  # ä takes two bytes
    assert (found.texts, found.empty) == (2, 1)


def test_a_text_longer_than_the_judge_reads_is_named(gpt2: tuple[Path, Any, Any]) -> None:
    judge = load_judge(f"hf:{gpt2[0]}", device="cpu")
    assert len(judge("x" * 63)) == 63
    with pytest.raises(ValueError, match=r"65 tokens is too long for the judge .*, which reads 64"):
        judge("x" * 64)


def test_the_causal_mode_is_a_judge(random_lm: LanguageModel) -> None:
    model = random_lm.model
    nats, tokens = 0.0, 0
    for text in TEXTS:
        ids = [2, *random_lm.tokenizer.encode(text)]
        with torch.inference_mode():
            logits = model.encode([torch.tensor(ids)], model.new_cache(), logits=True)
        assert logits is not None
        nats += torch.nn.functional.cross_entropy(logits[0][:-1], torch.tensor(ids[1:]), reduction="sum").item()
        tokens += len(ids) - 1
    assert perplexity(TEXTS, random_lm) == pytest.approx(exp(nats / tokens), rel=1e-4)


def test_nothing_to_judge_is_an_error(random_lm: LanguageModel) -> None:
    with pytest.raises(ValueError, match="every answer is empty"):
        perplexity(["", ""], random_lm)
