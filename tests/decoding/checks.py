"""What each trap of decoding would break: checks that hold for our code and fail once a trap is put in."""

from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from parity.reference import make_reference, randomise, tokens
from parity.trajectory import CONFIG, OPTIONS, Trajectory, calm, noises, our_trajectories, reference_trajectories
from torch import Tensor
from torch.nn.functional import gelu
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    EntropyBoundSampler,
    EntropyBoundSamplerConfig,
)

import dgemma
from dgemma.config import GenerationConfig
from dgemma.decoding import blocks, sampler, vocabulary
from dgemma.decoding.events import Block, Event, Finished, Step
from dgemma.model import attention, network
from dgemma.model.cache import Cache
from dgemma.model.experts import Experts
from dgemma.model.head import TiedEmbedding
from dgemma.model.network import DiffusionGemma

NEVER = (CONFIG.vocab_size + 1,)
C = CONFIG.canvas_length
SCORES = 1 << 13
"""The limit on attention scores that the memory check sets, in elements."""


@lru_cache(maxsize=1)
def quiet() -> tuple[DiffusionGemma, Any]:
    return make_reference(CONFIG, 7, calm)


@lru_cache(maxsize=1)
def lively() -> DiffusionGemma:
    """Random weights as they are: self-conditioning is strong in these."""
    model = DiffusionGemma(CONFIG).eval()
    randomise(model, 3)
    return model


def prompt(length: int, seed: int = 0) -> Tensor:
    return tokens((length,), CONFIG.vocab_size, seed)


def run(
    model: DiffusionGemma, *prompts: Tensor, seed: int = 0, cache: Cache | None = None, **options: Any
) -> list[Event]:
    chosen = replace(OPTIONS, **{"eos_token_id": NEVER} | options)
    requests = [blocks.Request(p, chosen, n) for p, n in zip(prompts, noises(seed, len(prompts)), strict=True)]
    return list(blocks.generate(model, requests, cache))


def encoded(model: DiffusionGemma, *prompts: Tensor) -> Cache:
    cache = model.new_cache(len(prompts))
    with torch.no_grad():
        model.encode(list(prompts), cache)
    return cache


@lru_cache(maxsize=4)
def expected(seed: int) -> list[Trajectory]:
    return reference_trajectories(quiet()[1], tokens((3, 9), CONFIG.vocab_size, seed), OPTIONS, noises(seed, 3))


def trajectories_equal_the_reference() -> None:
    for seed in (0, 1):
        rows = list(tokens((3, 9), CONFIG.vocab_size, seed))
        for mine, theirs in zip(
            our_trajectories(quiet()[0], rows, OPTIONS, noises(seed, 3)), expected(seed), strict=True
        ):
            assert mine.blocks == theirs.blocks
            assert mine.tokens == theirs.tokens


def a_row_stops_at_its_first_repetition() -> None:
    """However sure it is: with no bound on entropy, at the first best canvas that equals those just before it."""
    for stability in (1, 2, 3):
        options = {"max_new_tokens": C, "confidence_threshold": 1e9, "max_denoising_steps": 40}
        events = run(lively(), prompt(5), stability_threshold=stability, **options)
        steps = [e for e in events if isinstance(e, Step)]
        best = [step.best.tolist() for step in steps]
        for n, step in enumerate(steps):
            repeated = n >= stability and all(best[n - k] == best[n] for k in range(1, stability + 1))
            assert step.still == repeated


def acceptance_is_the_references() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 6 * torch.rand(40, 1, 1, generator=generator) * torch.randn(40, 16, 30, generator=generator)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    for bound in (1e-6, 0.1, 1.0, 7.0):
        theirs = EntropyBoundSampler(EntropyBoundSamplerConfig(bound), 16, 30, 1)
        theirs.accept_canvas(torch.zeros(40, 16).long(), torch.zeros(40, 16).long(), logits, 1)
        accepted = sampler.accept(entropy, torch.full((40,), bound))
        assert accepted.any(-1).all()
        assert torch.equal(accepted, theirs.accepted_token_mask)


def temperatures_follow_the_steps_left() -> None:
    """0.8 at first and, of 48 steps, 0.4083 at last: t_min itself is never reached."""
    release = GenerationConfig()
    options = {"max_new_tokens": C, "max_denoising_steps": 48, "confidence_threshold": 1e-12}
    events = run(lively(), prompt(5), t_min=release.t_min, t_max=release.t_max, **options)
    found = [e.temperature for e in events if isinstance(e, Step)]
    assert len(found) == 48
    wanted = [0.4 + 0.4 * left / 48 for left in range(48, 0, -1)]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted))


def the_clean_canvas_is_committed() -> None:
    """What is encoded and what is answered is the arg-max of the last step, and that is not the canvas."""
    given: list[list[int]] = []
    encode = DiffusionGemma.encode

    def spy(self: DiffusionGemma, rows: Any, cache: Cache, logits: bool = False, **rest: Any) -> Any:
        given.extend(torch.as_tensor(row).tolist() for row in rows)
        return encode(self, rows, cache, logits, **rest)

    with mock.patch.object(DiffusionGemma, "encode", spy):
        events = run(lively(), prompt(5), max_denoising_steps=3)
    ends = [i for i, e in enumerate(events) if isinstance(e, Block)]
    last = [events[i - 1] for i in ends]
    assert any(step.best.tolist() != step.canvas.tolist() for step in last)
    assert [events[i].tokens for i in ends] == [step.best.tolist() for step in last]
    assert given == [prompt(5).tolist(), *(step.best.tolist() for step in last[:-1])]


def self_conditioning_is_the_last_steps_and_of_this_block() -> None:
    """A step's entropies are those of `denoise` with the last step's scaled logits, and with none on a first step."""
    model = lively()
    text, cache, canvas, previous = prompt(5), encoded(model, prompt(5)), None, None
    noise = noises(0, 1)[0]
    events = [e for e in run(model, text, max_denoising_steps=3) if isinstance(e, Step | Block)]
    assert sum(isinstance(e, Block) for e in events) == 3
    for event in events:
        if isinstance(event, Block):
            text = torch.cat((text, torch.tensor(event.tokens)))
            cache, previous = encoded(model, text), None
            continue
        canvas = noise.canvas(event.block) if event.step == 1 else canvas
        with torch.no_grad():
            previous = model.denoise(canvas[None], cache, previous) / event.temperature
        entropy = torch.distributions.Categorical(logits=previous[0]).entropy()
        torch.testing.assert_close(event.entropy, entropy, atol=1e-3, rtol=1e-3)
        canvas = event.canvas


def the_cap_is_in_float32_and_before_the_temperature() -> None:
    for cap, dtype in ((3.0, torch.float32), (30.0, torch.bfloat16)):
        head = TiedEmbedding(replace(CONFIG, final_logit_softcapping=cap)).requires_grad_(False)
        randomise(head, 0)
        head.to(dtype)
        states = 2 * torch.randn(2, 6, CONFIG.hidden_size, generator=torch.Generator().manual_seed(1)).to(dtype)
        temperature = torch.tensor([0.4, 0.8])
        found = vocabulary.read(head, states, temperature, torch.full((2, 6), 0.5))
        raw = torch.nn.functional.linear(states, head.weight).double()
        logits = cap * torch.tanh(raw / cap) / temperature[:, None, None]
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        torch.testing.assert_close(found.entropy.double(), entropy, atol=1e-4, rtol=1e-4)


def rows_equal_the_same_rows_alone() -> None:
    """Prefixes of different lengths in one batch: logits, and whole generations, are those of each row alone."""
    model = quiet()[0]
    rows = [prompt(length, length) for length in (3, 14, 9)]
    canvas = tokens((3, C), CONFIG.vocab_size, 5)
    with torch.no_grad():
        together = model.denoise(canvas, encoded(model, *rows))
        alone = [model.denoise(canvas[i : i + 1], encoded(model, row))[0] for i, row in enumerate(rows)]
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-4, rtol=1e-4)
    noise = noises(2, 3)
    batch = our_trajectories(model, rows, OPTIONS, noise)
    for i, row in enumerate(rows):
        assert batch[i].blocks == our_trajectories(model, [row], OPTIONS, noise[i : i + 1])[0].blocks


def any_chunking_gives_the_same_cache() -> None:
    model, canvas = quiet()[0], tokens((1, C), CONFIG.vocab_size, 5)
    found = []
    for chunk in (1024, 1, 4, 8, 13):
        with mock.patch.object(network, "CHUNK", chunk), torch.no_grad():
            found.append(model.denoise(canvas, encoded(model, prompt(30))))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-4, rtol=1e-4)


def all_three_end_tokens_are_known(shared: Path) -> None:
    defaults = dgemma.load(shared / "small", device="cpu").defaults
    assert defaults.eos_token_id == (1, 106, 50)
    assert GenerationConfig.from_file(shared / "generation_config.json").eos_token_id == (1, 106, 50)


def a_limit_within_a_canvas_cuts_the_answer_only() -> None:
    long, short = (run(lively(), prompt(5), max_new_tokens=n, max_denoising_steps=4) for n in (2 * C, 2 * C - 3))
    assert len(short[-1].tokens) == 2 * C - 3
    assert short[-1].tokens == long[-1].tokens[: 2 * C - 3]
    canvases = [[e.canvas.tolist() for e in events if isinstance(e, Step)] for events in (long, short)]
    assert canvases[0] == canvases[1]
    assert all(len(canvas) == C for canvas in canvases[1])


def a_block_at_the_cap_is_not_called_converged() -> None:
    capped = run(lively(), prompt(5), max_denoising_steps=3, confidence_threshold=1e-12)[-1]
    assert isinstance(capped, Finished)
    assert (capped.reason, capped.steps, capped.converged) == ("length", [3] * 3, [False] * 3)
    free = run(quiet()[0], prompt(5), max_denoising_steps=40)[-1]
    assert free.converged == [True] * 3
    assert all(steps < 40 for steps in free.steps)


class Largest(TorchDispatchMode):
    """Notes the most elements that any result of an operation has."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return out


def a_long_prompt_holds_few_scores() -> None:
    """Neither scores nor masks grow with the square of the prompt: the largest tensor stays at the limit."""
    assert attention.SCORES_LIMIT * 4 <= 1 << 28
    model, length = quiet()[0], 500
    with mock.patch.object(attention, "SCORES_LIMIT", SCORES), Largest() as seen:
        encoded(model, prompt(length))
    chosen = length * CONFIG.top_k_experts
    panel = (chosen + 16 * CONFIG.num_experts) * CONFIG.hidden_size  # the experts' rows, in another order
    linear = max(length * 2 * CONFIG.hidden_size, chosen * 2 * CONFIG.moe_intermediate_size, panel)
    assert CONFIG.num_attention_heads * length**2 > 10 * max(SCORES, linear)
    assert seen.elements <= max(SCORES, linear)


def a_prompts_cache_serves_many() -> None:
    """Its pages, full (16 tokens) or begun (13), keep every byte, and two who continue it do not meet."""
    model = quiet()[0]
    for length in (16, 13):
        cache = encoded(model, prompt(length))
        pages = [p for kinds in cache.rows[0].pages.values() for p in kinds if p is not None]
        before = [page.numpy().tobytes() for page in pages]
        forks = [cache.fork(), cache.fork()]
        with torch.no_grad():
            for seed, fork in enumerate(forks):
                model.encode([prompt(5, seed)], fork)
            canvas = tokens((1, C), CONFIG.vocab_size, 5)
            for seed, fork in enumerate(forks):
                whole = encoded(model, torch.cat((prompt(length), prompt(5, seed))))
                torch.testing.assert_close(
                    model.denoise(canvas, fork), model.denoise(canvas, whole), atol=1e-4, rtol=1e-4
                )
        answers = [run(model, prompt(4), cache=cache)[-1].tokens for _ in range(2)]
        assert answers[0] == answers[1]
        assert cache.lengths == [length]
        assert [page.numpy().tobytes() for page in pages] == before


def grouped_experts_equal_a_plain_loop() -> None:
    """In float32, where nothing but the order of sums differs; then bfloat16 within its rounding."""
    experts = Experts(CONFIG).requires_grad_(False)
    randomise(experts, 2)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(21, CONFIG.hidden_size, generator=generator)
    weights = torch.rand(21, 2, generator=generator)
    chosen = torch.stack([torch.randperm(3, generator=generator)[:2] for _ in range(21)])
    expected = torch.zeros_like(x)
    for i in range(len(x)):
        for weight, e in zip(weights[i], chosen[i], strict=True):
            gate, up = (experts.gate_up_proj[e] @ x[i]).chunk(2)
            expected[i] += weight * (experts.down_proj[e] @ (gelu(gate, approximate="tanh") * up))
    torch.testing.assert_close(experts(x, weights, chosen), expected, atol=1e-5, rtol=1e-5)
    rounded = experts.to(torch.bfloat16)(x.to(torch.bfloat16), weights, chosen)
    assert rounded.dtype == torch.bfloat16
    assert float((rounded.float() - expected).norm() / expected.norm()) < 0.02


@contextmanager
def planted(*changes: tuple[Any, str, Any]) -> Any:
    """Replaces attributes (owner, name, value) for a while."""
    patches = [mock.patch.object(*change) for change in changes]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in reversed(patches):
            patch.stop()
