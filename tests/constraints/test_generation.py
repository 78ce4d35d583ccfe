"""Whole answers under constraints, from a network that knows nothing: valid at every seed, limit and step count."""

import json
import random
import re
from dataclasses import replace

import jsonschema
import pytest
import torch
from constraints.schemas import schema_of

import dgemma
from dgemma import embedded
from dgemma.config import ModelConfig
from dgemma.constraints.grammar import grammar
from dgemma.constraints.schema import json_schema
from dgemma.constraints.tools import tool_calls
from dgemma.decoding import blocks
from dgemma.decoding.blocks import Request
from dgemma.decoding.events import Finished
from dgemma.decoding.pins import Known
from dgemma.language_model import LanguageModel
from dgemma.model.network import DiffusionGemma

SMALL = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "canvas_length": 16}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "num_global_key_value_heads": 2}


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    """tiny's tokenizer and template; random weights, a canvas of 16."""
    tiny = dgemma.load("tiny", "cpu")
    config = ModelConfig.from_file(embedded.HERE / "tiny" / "config.json")
    config = replace(config, **SMALL, **HEADS, global_head_dim=16, initializer_range=0.3)
    return replace(tiny, model=DiffusionGemma(config).init_weights(1).eval())


def answers(lm: LanguageModel, schemas: list[dict], rng: random.Random) -> list[str]:
    """An answer to each schema, all in one batch, with options drawn for each."""
    requests = []
    for seed, schema in enumerate(schemas):
        options = lm.defaults.with_options(max_new_tokens=400, max_denoising_steps=rng.choice((1, 2, 5)))
        options = options.with_options(t_max=rng.choice((0.8, 5.0)), entropy_bound=rng.choice((0.1, 50.0)))
        automaton = lm.automaton(schema, options)
        shortest = next(n for n in range(1, 400) if fits(Known(constraint=automaton), options, n))
        limit = shortest + rng.choice((0, 0, 1, 5, 40))
        prompt = torch.tensor(lm.tokens("Hi"))
        chosen = replace(options, max_new_tokens=limit)
        requests.append(Request(prompt, chosen, lm.noise(seed), Known(constraint=automaton)))
    told = {e.row: e for e in blocks.generate(lm.model, requests) if isinstance(e, Finished)}
    return [lm.tokenizer.decode(told[row].tokens, skip_special=False) for row in range(len(schemas))]


def fits(known: Known, options: dgemma.GenerationConfig, limit: int) -> bool:
    try:
        known.check(replace(options, max_new_tokens=limit), ModelConfig.from_file(embedded.HERE / "tiny/config.json"))
    except ValueError:
        return False
    return True


def test_five_hundred_schemas_are_kept_to(lm: LanguageModel) -> None:
    rng = random.Random(1)
    for _ in range(20):
        some = [schema_of(rng, 2) for _ in range(25)]
        for schema, text in zip(some, answers(lm, some, rng), strict=True):
            for end in ("<eos>", "<turn|>", "<|tool_response>", "<pad>", "<|channel>thought\n<channel|>"):
                text = text.replace(end, "")
            jsonschema.Draft202012Validator(schema).validate(json.loads(text))


@pytest.mark.parametrize("steps", [1, 3])
def test_the_other_kinds(lm: LanguageModel, steps: int) -> None:
    options = {"max_denoising_steps": steps, "max_new_tokens": 70}
    for seed in range(3):
        ask = lambda constraint, seed=seed: lm.generate("Hi", constraint=constraint, seed=seed, **options)  # noqa: E731
        assert ask(["yes", "no", "neither of them"]).text in ("yes", "no", "neither of them")
        assert re.fullmatch(r"[a-f]{5,40}-\d+", ask(r"[a-f]{5,40}-\d+").text)
        assert isinstance(json.loads(ask(json_schema({"type": "object"})).text), dict)
        sums = ask(grammar('start: n ("+" n)*\nn: /[0-9]+/ | "(" start ")"'))
        assert re.fullmatch(r"[0-9+()]+", sums.text)
        eval(re.sub(r"\b0+(?=\d)", "", sums.text))
        schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
        told = ask(tool_calls([{"type": "function", "function": {"name": "weather", "parameters": schema}}]))
        assert told.finish_reason == "tool_calls"
        (call,) = told.tool_calls
        assert call.name == "weather"
        jsonschema.validate(call.arguments, schema)


def test_a_thought_may_come_first(lm: LanguageModel) -> None:
    told = [
        lm.generate("Hi", constraint=["ja"], think=True, seed=s, max_new_tokens=60, max_denoising_steps=3)
        for s in range(4)
    ]
    assert {answer.text for answer in told} == {"ja"}


def test_bfloat16(lm: LanguageModel) -> None:
    half = replace(lm, model=DiffusionGemma(lm.model.config).init_weights(2).to(torch.bfloat16).eval())
    told = half.generate("Hi", constraint={"type": "integer", "minimum": 7}, max_denoising_steps=3)
    assert int(told.text) >= 7


def test_a_limit_that_holds_no_answer_is_refused_before_anything_is_done(lm: LanguageModel) -> None:
    with pytest.raises(ValueError, match="no answer of at most 3 tokens fits the constraint"):
        lm.generate("Hi", constraint={"type": "object", "required": ["abc"]}, max_new_tokens=3)
    with pytest.raises(ValueError, match="the autoregressive mode takes none"):
        list(lm.stream("Hi", constraint=["a"], autoregressive=True))
