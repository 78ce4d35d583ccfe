"""Pages in 8 bits: what rounding costs and what memory it saves; they are shared and dropped as plain ones are."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paged import PAGED
from parity.reference import randomise, tokens
from torch import Tensor

import dgemma
from dgemma.config import FULL, SLIDING, GenerationConfig
from dgemma.decoding.blocks import Request, generate
from dgemma.decoding.events import Finished, Prefilled
from dgemma.decoding.noise import Noise
from dgemma.engine.engine import Engine
from dgemma.engine.scheduler import Limits, Scheduler
from dgemma.model import network
from dgemma.model.cache import Cache
from dgemma.model.kv_formats import FORMATS, PLAIN, PageFormat
from dgemma.model.network import DiffusionGemma

CONFIG = replace(PAGED, hidden_size=32, head_dim=16, global_head_dim=32)
VALUES = {FULL: 2 * 2 * 1, SLIDING: 3 * 2 * 2}
"""By hand, a token: layers, keys and values, heads."""
SIZE = {FULL: 32, SLIDING: 16}
PUZZLE = ".16....9. 45...72.. ..8..6731 .69.34..5 .4579.... ...5.24.9 ..1.4...7 ...1893.. .8.67...."
LARGEST = {"int8": 127.0, "fp8": 448.0}

formats = pytest.mark.parametrize("name", FORMATS)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def network_with(name: str | None, dtype: torch.dtype = torch.float32) -> DiffusionGemma:
    model = DiffusionGemma(CONFIG).eval()
    randomise(model, 1)
    model.page_format = FORMATS[name] if name else PLAIN
    return model.to(dtype)


def prompt(length: int, seed: int = 0) -> Tensor:
    return tokens((length,), CONFIG.vocab_size, seed)


def encoded(model: DiffusionGemma, *prompts: Tensor) -> Cache:
    cache = model.new_cache(len(prompts))
    model.encode(list(prompts), cache)
    return cache


def logits(model: DiffusionGemma, cache: Cache) -> Tensor:
    return model.denoise(tokens((len(cache.rows), CONFIG.canvas_length), CONFIG.vocab_size, 9), cache)


def bytes_held(model: DiffusionGemma, length: int) -> int:
    cache = model.new_cache()
    cache.reserve(0, length)
    cache.advance(0, length)
    return cache.nbytes


def round_trip(format: PageFormat, x: Tensor) -> Tensor:
    return format.decode(format.encode(x), x.dtype)


@formats
@given(st.integers(0, 10**6), st.floats(-30, 30), st.sampled_from([8, 30, 64]))
def test_no_value_is_off_by_more_than_half_a_step(name: str, seed: int, exponent: float, size: int) -> None:
    x = torch.randn(3, 5, size, generator=torch.Generator().manual_seed(seed)) * 10**exponent
    top = x.abs().amax(-1, keepdim=True)
    # int8 steps are as wide as the scale, which bfloat16 may round up by 2^-8; e4m3 has 3 bits of fraction, down to
    # 2^-6, and below that a step of 2^-9.
    relative = 2**-4 if name == "fp8" else 0
    step = top / LARGEST[name] * (2**-9 if name == "fp8" else 1)
    bound = torch.maximum(x.abs() * relative, step * (1 + 2**-8) / 2) * (1 + 1e-5)
    back = round_trip(FORMATS[name], x)
    assert back.shape == x.shape
    assert bool(((back - x).abs() <= bound).all())


@formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_huge_and_tiny_vectors_do_not_touch_each_other(name: str, dtype: torch.dtype) -> None:
    one = torch.linspace(-1, 1, 16)
    rows = torch.stack((torch.zeros(16), one * 1e37, one * 1e-34, one)).to(dtype)
    back = round_trip(FORMATS[name], rows)
    assert bool(back.isfinite().all())
    assert torch.equal(back[0], rows[0])
    for row, got in zip(rows[1:].double(), back[1:].double(), strict=True):
        # Half a step of the largest, and bfloat16's rounding of the product.
        assert (got - row).abs().max() <= row.abs().max() * {"int8": 0.004, "fp8": 0.036}[name] * 1.6


@formats
def test_what_is_broken_stays_so(name: str) -> None:
    for bad in (float("nan"), float("inf")):
        assert bool(round_trip(FORMATS[name], torch.tensor([1.0, bad, 2.0, 3.0])).isnan().any())


def test_the_plain_format_copies_nothing() -> None:
    x = torch.randn(2, 8)
    assert PLAIN.encode(x) is x
    assert PLAIN.decode(x, x.dtype) is x
    assert network_with(None).new_cache().format is PLAIN


@formats
def test_a_page_holds_what_the_format_makes_of_its_keys(name: str) -> None:
    """In the first layer, which reads nothing that is rounded."""
    (plain, *_), (stored, *_) = (encoded(network_with(k), prompt(7)).rows[0].pages[SLIDING] for k in (None, name))
    assert plain is not None
    assert stored is not None
    assert stored.dtype == torch.int8
    assert torch.equal(FORMATS[name].decode(stored[0], torch.float32), round_trip(FORMATS[name], plain[0]))


@formats
def test_bytes_are_a_quarter_of_float32_and_half_of_bfloat16_and_the_scales(name: str) -> None:
    for length in (1, 4, 22, 61):
        model = network_with(name)
        small = bytes_held(model, length)
        assert small == model.cache_bytes(length) == CONFIG.cache_bytes(length, 1, 2)
        pages = -(-length // 4)
        held = {FULL: pages, SLIDING: pages - max(0, (length - 10) // 4)}
        codes = sum(4 * held[kind] * VALUES[kind] * SIZE[kind] for kind in held)
        scales = sum(4 * held[kind] * VALUES[kind] * 2 for kind in held)
        assert small == codes + scales
        for dtype, share in ((torch.float32, 4), (torch.bfloat16, 2)):
            assert bytes_held(network_with(None, dtype), length) == share * codes
            assert bytes_held(network_with(name, dtype), length) == small


@formats
def test_pages_out_of_the_window_are_dropped(name: str) -> None:
    plain, small = network_with(None), network_with(name)
    rows = [encoded(model, prompt(61)).rows[0] for model in (plain, small)]
    dropped = [[page is None for page in row.pages[SLIDING]] for row in rows]
    assert dropped[0] == dropped[1]
    assert sum(dropped[1]) == (61 - 10) // 4


@formats
@pytest.mark.parametrize("chunk", [3, 5, 16])
def test_where_a_chunk_ends_does_not_matter(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt reads itself as it will be read: otherwise chunks would differ as much as the rounding does."""
    model = network_with(name)
    prompts = [prompt(25), prompt(18, 1)]
    whole = encoded(model, *prompts)
    causal = model.encode(prompts, model.new_cache(2), logits=True)
    monkeypatch.setattr(network, "CHUNK", chunk)
    pieces = model.encode(prompts, model.new_cache(2), logits=True)
    seen = logits(model, whole)
    off = (seen - logits(network_with(None), encoded(network_with(None), *prompts))).abs().max()
    assert (seen - logits(model, encoded(model, *prompts))).abs().max() < 0.1 * off
    for mine, yours in zip(pieces, causal, strict=True):
        torch.testing.assert_close(mine, yours, atol=0.1 * float(off), rtol=0)


@formats
def test_a_fork_continues_and_shares_full_pages(name: str) -> None:
    model = network_with(name)
    source = encoded(model, prompt(22))
    before = [page.clone() for page in source.rows[0].pages[FULL]]
    fork = source.fork([0, 0])
    shared = [a is b for a, b in zip(source.rows[0].pages[FULL], fork.rows[1].pages[FULL], strict=True)]
    assert shared == [True] * 5 + [False]
    model.encode([prompt(6, 11), prompt(9, 12)], fork)
    assert all(torch.equal(a, b) for a, b in zip(before, source.rows[0].pages[FULL], strict=True))
    wholes = [torch.cat((prompt(22), prompt(6, 11))), torch.cat((prompt(22), prompt(9, 12)))]
    torch.testing.assert_close(logits(model, fork), logits(model, encoded(model, *wholes)), atol=0.02, rtol=0.02)


def kl(wanted: Tensor, got: Tensor) -> float:
    """Nats, the mean over positions."""
    p, q = wanted.double().log_softmax(-1), got.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.mark.parametrize(("name", "most"), [("int8", 1e-3), ("fp8", 1e-2)])
def test_logits_of_a_trained_model_stay_close(name: str, most: float) -> None:
    models = [dgemma.load("sudoku", "cpu", "float32", kv_cache=kind) for kind in (None, name)]
    clues = models[0].tokens(PUZZLE)
    canvas = tokens((1, models[0].model.config.canvas_length), models[0].model.config.vocab_size, 0)
    found = [lm.model.denoise(canvas, encoded(lm.model, torch.tensor(clues))) for lm in models]
    assert 0 < kl(*found) < most


def test_an_unknown_format_is_named() -> None:
    with pytest.raises(ValueError, match="kv_cache='int4' is not one of int8, fp8"):
        dgemma.load("sudoku", kv_cache="int4")


def request(seed: int, length: int, shared: int = 0) -> Request:
    whole = torch.cat((prompt(shared, 99), prompt(length - shared, seed)))
    options = GenerationConfig(max_new_tokens=10, max_denoising_steps=6, eos_token_id=(1, 7))
    return Request(whole, options, Noise(seed, CONFIG.vocab_size, CONFIG.canvas_length))


@formats
def test_shared_prefixes_give_the_same_tokens_as_none(name: str) -> None:
    model = network_with(name)
    made = [partial(request, seed, length, 40) for seed, length in ((1, 45), (2, 45), (3, 61))]
    answers = {}
    for kept in (1 << 20, 0):
        with Engine(model, Limits(prefix_bytes=kept, prefill_tokens=16)) as engine:
            streams = [list(engine.stream(make())) for make in made]
            assert engine.scheduler.prefixes.nbytes <= kept
        cached = [event.cached for events in streams for event in events if isinstance(event, Prefilled)]
        assert cached == ([0, 40, 40] if kept else [0] * 3)
        answers[kept] = [events[-1].tokens for events in streams if isinstance(events[-1], Finished)]
    alone = [list(generate(model, [make()]))[-1] for make in made]
    assert answers[0] == answers[1 << 20] == [last.tokens for last in alone if isinstance(last, Finished)]


@formats
def test_an_engine_takes_in_more_rows_of_small_pages(name: str) -> None:
    """A plain row takes the room of more than three, less than four."""
    limits = Limits(cache_bytes=4 * network_with(name).cache_bytes(32))
    running = {}
    for kind in (None, name):
        scheduler = Scheduler(network_with(kind), limits)
        for seed in range(5):
            scheduler.submit(request(seed, 20), lambda event: None, lambda error: None)
        scheduler.step()
        running[kind] = len(scheduler.running)
        pages = [page for job in scheduler.running for page in job.row.pages[FULL]]
        assert {page.dtype for page in pages} == {torch.int8 if kind else torch.float32}
    assert running == {None: 1, name: 4}
