"""LanguageModel: what a Python user relies on. The embedded model and the small released checkpoint stand in."""

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import dgemma
from dgemma import Block, Finished, LanguageModel, Prefilled, Step, embedded

PUZZLE = "53..7.912 6..195..8 198...567 .5.76..23 4.68.3.91 7.39.4..6 9615..284 2.74196.5 3..28.1.9"
needs_sudoku = pytest.mark.skipif("sudoku" not in embedded.names(), reason="the Sudoku model is not in this checkout")


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return dgemma.load("sudoku")


@pytest.fixture(scope="module")
def small(shared: Path) -> LanguageModel:
    return dgemma.load(shared / "small", dtype="float32")


def test_importing_the_package_leaves_torch_alone() -> None:
    code = "import sys, dgemma; dgemma.GenerationConfig(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@needs_sudoku
def test_a_generation_carries_its_telemetry(lm: LanguageModel) -> None:
    answer = lm.generate(PUZZLE)
    assert lm.task is not None
    assert lm.task.check(PUZZLE, answer.text).right
    assert (answer.finish_reason, answer.converged, answer.seed) == ("stop", [True], 0)
    assert answer.tokens[-1] in lm.defaults.eos_token_id
    assert answer.tokens_per_forward == len(answer.tokens) / sum(answer.steps)
    assert answer.prompt_tokens == len(lm.tokens(PUZZLE))
    assert set(answer.seconds) == {"prefill", "denoise", "commit"}
    assert answer.seconds["denoise"] > 0


@needs_sudoku
def test_text_messages_and_tokens_ask_the_same(lm: LanguageModel) -> None:
    as_text = lm.generate(PUZZLE, seed=3)
    as_messages = lm.generate([{"role": "user", "content": PUZZLE}], seed=3)
    as_tokens = lm.generate(lm.tokens(PUZZLE), seed=3)
    assert as_text.tokens == as_messages.tokens == as_tokens.tokens
    assert as_text.steps == as_messages.steps == as_tokens.steps


@needs_sudoku
def test_a_stream_is_prefill_steps_block_end(lm: LanguageModel) -> None:
    events = list(lm.stream(PUZZLE))
    steps = [e for e in events if isinstance(e, Step)]
    assert [type(e) for e in events] == [Prefilled, *[Step] * len(steps), Block, Finished]
    assert [s.step for s in steps] == list(range(1, len(steps) + 1))
    assert steps[-1].still
    assert steps[-1].best.tolist() == events[-2].tokens


@needs_sudoku
def test_noise_can_be_replaced(lm: LanguageModel) -> None:
    class Recorded:
        def canvas(self, block: int) -> torch.Tensor:
            return torch.full((90,), 7)

        def renoise(self, block: int, step: int) -> torch.Tensor:
            return torch.full((90,), 8)

        def uniform(self, block: int, step: int) -> torch.Tensor:
            return torch.zeros(90)

    first, *_ = [e for e in lm.stream(PUZZLE, noise=[Recorded()], entropy_bound=0.0) if isinstance(e, Step)]
    assert set(first.canvas[~first.accepted].tolist()) <= {8}
    assert (~first.accepted).any()


def test_batches_of_options_are_checked_by_name(small: LanguageModel) -> None:
    with pytest.raises(ValueError, match="unknown option 'steps'"):
        small.stream([1, 2], steps=3)
    with pytest.raises(ValueError, match="t_max"):
        small.stream([1, 2], t_min=0.9)
    with pytest.raises(ValueError, match="autoregressive mode"):
        small.stream([1, 2], temperature=0.5)
    with pytest.raises(ValueError, match="seed must lie in"):
        small.stream([1, 2], seed=-1)
    with pytest.raises(ValueError, match="token id 1024 is not in 0 … 1023"):
        small.stream([1, 1024])
    with pytest.raises(ValueError, match="prompt of row 0 is empty"):
        small.generate([])
    with pytest.raises(ValueError, match="has no chat template"):
        small.generate([{"role": "user", "content": "hello"}])


def test_several_blocks_and_a_limit_within_one(small: LanguageModel) -> None:
    answer = small.generate([5, 6, 7], max_new_tokens=70, max_denoising_steps=3, eos_token_id=())
    assert len(answer.tokens) == 70
    assert answer.finish_reason == "length"
    assert len(answer.steps) == len(answer.converged) == 3


def test_log_probabilities_are_those_of_the_causal_mode(small: LanguageModel) -> None:
    prompt, continuation = [5, 6, 7, 8], [9, 10, 11]
    with torch.inference_mode():
        logits = small.model.encode(torch.tensor([[*prompt, *continuation]]), small.model.new_cache(), logits=True)
    expected = logits[0].log_softmax(-1)
    scores = small.log_probabilities(prompt, continuation)
    assert scores == pytest.approx([float(expected[3 + i, t]) for i, t in enumerate(continuation)], abs=1e-5)
    with pytest.raises(ValueError, match="nothing to score"):
        small.log_probabilities(prompt, [])


@pytest.fixture
def talkative(small: LanguageModel) -> LanguageModel:
    from dgemma.text.chat import ChatTemplate

    turns = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    source = turns + "{% if add_generation_prompt %}model: {% endif %}"
    return LanguageModel(**(vars(small) | {"template": ChatTemplate(source)}))


def test_a_chat_encodes_only_what_is_new(talkative: LanguageModel) -> None:
    chat = talkative.chat(max_denoising_steps=2, max_new_tokens=32)
    first = list(chat.send("one"))
    settled = talkative.tokenizer.encode(talkative.render([{"role": "user", "content": "one"}], reply=False))
    assert next(e for e in first if isinstance(e, Prefilled)).cached == len(settled)
    before = chat._cache
    second = list(chat.send("two"))
    assert chat._cache is before, "the prefix of the first turn was kept"
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 2

    whole = talkative.tokens(chat.messages[:3])
    fresh = talkative.generate(whole, max_denoising_steps=2, max_new_tokens=32)
    assert fresh.tokens == second[-1].tokens
    chat.reset()
    assert chat.messages == []


def test_a_turn_that_is_stopped_leaves_the_conversation_as_it_was(talkative: LanguageModel) -> None:
    chat = talkative.chat(max_denoising_steps=2, max_new_tokens=32)
    stream = chat.send("one")
    next(stream)
    stream.close()
    assert chat.messages == []
    assert isinstance(list(chat.send("two"))[-1], Finished)


def test_generations_are_plain_data(small: LanguageModel) -> None:
    values = asdict(small.generate([5, 6], max_new_tokens=8, max_denoising_steps=1))
    assert {"text", "tokens", "finish_reason", "steps", "converged", "seed", "seconds"} <= set(values)
