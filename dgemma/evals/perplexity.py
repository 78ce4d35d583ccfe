"""Generative perplexity: how likely free texts are to a judge, which reads them left to right."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, log
from typing import Any

from dgemma.checkpoints.load import resolve_device
from dgemma.language_model import LanguageModel, load

HUGGING_FACE = "hf:"

Judge = Callable[[str], list[float]]
"""The log-probability in nats of each token of a text."""


@dataclass(frozen=True)
class Judgement:
    """perplexity is a token's, so it compares under one judge only; bits_per_byte (UTF-8) compares between judges.

    texts were judged, `empty` ones left out.
    """

    perplexity: float
    bits_per_byte: float
    texts: int
    empty: int


def perplexity(texts: Sequence[str], judge: LanguageModel) -> float:
    """exp of the mean negative log-likelihood of a token, by the judge's causal mode."""
    return judgement(texts, diffusion_gemma(judge)).perplexity


def judgement(texts: Sequence[str], judge: Judge) -> Judgement:
    """What a judge says of texts as a whole. ValueError if all of them are empty."""
    full = [text for text in texts if text]
    if not full:
        raise ValueError("there is no text to judge: every answer is empty")
    scores = [score for text in full for score in judge(text)]
    nats, size = -sum(scores), sum(len(text.encode()) for text in full)
    return Judgement(exp(nats / len(scores)), nats / log(2) / size, len(full), len(texts) - len(full))


def load_judge(source: str, device: str = "auto", dtype: str = "auto") -> Judge:
    """A judge from a model that dgemma can load, or "hf:" and a directory or hub id of a causal LM of transformers."""
    if source.startswith(HUGGING_FACE):
        return _transformers(source.removeprefix(HUGGING_FACE), device, dtype)
    return diffusion_gemma(load(source, device, dtype))


def diffusion_gemma(lm: LanguageModel) -> Judge:
    """The causal mode of a checkpoint, over texts behind a bos token."""
    return lambda text: lm.log_probabilities([lm.model.config.bos_token_id], text)


def _transformers(source: str, device: str, dtype: str) -> Judge:
    import torch

    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise ValueError(f"the judge {HUGGING_FACE}{source} needs transformers: pip install transformers") from None
    tokenizer = AutoTokenizer.from_pretrained(source)
    place = resolve_device(device)
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    model.to(place).eval()
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start is None:
        raise ValueError(f"the judge {source} has neither a bos nor an eos token to begin a text with")
    room = getattr(model.config, "max_position_embeddings", None)

    @torch.inference_mode()
    def judge(text: str) -> list[float]:
        ids = [start, *tokenizer(text, add_special_tokens=False).input_ids]
        if room and len(ids) > room:
            raise ValueError(f"a text of {len(ids)} tokens is too long for the judge {source}, which reads {room}")
        tokens = torch.tensor([ids], device=place)
        scores = model(tokens[:, :-1]).logits.float().log_softmax(-1)
        return scores.gather(-1, tokens[:, 1:, None]).flatten().tolist()

    return judge
