"""The cache: any chunking gives the same one, rows do not touch each other, nothing shared is ever written."""

import pytest
import torch
from paged import PAGED as CONFIG
from parity.reference import randomise, tokens
from torch import Tensor

from dgemma.config import FULL, SLIDING, GenerationConfig, ModelConfig
from dgemma.decoding import blocks
from dgemma.decoding.noise import Noise
from dgemma.model import network
from dgemma.model.attention import Span
from dgemma.model.cache import Cache
from dgemma.model.network import DiffusionGemma

LONG = 61
"""A prompt of many pages (4) and windows (11), and a page begun."""


@pytest.fixture(scope="module")
def model() -> DiffusionGemma:
    model = DiffusionGemma(CONFIG).eval()
    randomise(model, 1)
    return model


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def prompt(length: int, seed: int = 0) -> Tensor:
    return tokens((length,), CONFIG.vocab_size, seed)


def encoded(model: DiffusionGemma, *prompts: Tensor) -> Cache:
    cache = model.new_cache(len(prompts))
    model.encode(list(prompts), cache)
    return cache


def held(cache: Cache, row: int) -> list[Tensor]:
    """Keys and values [2, K, S, D] that a canvas behind this row would read, a layer."""
    span = Span(row, 1, 1, cache.lengths[row], causal=False)
    return [torch.stack(cache.read(layer, span))[:, 0] for layer in range(CONFIG.num_hidden_layers)]


def pages(cache: Cache) -> list[bytes]:
    """Every byte of every page, whether it counts as encoded or not."""
    found = [p for row in cache.rows for kind in (FULL, SLIDING) for p in row.pages[kind] if p is not None]
    return [page.contiguous().numpy().tobytes() for page in found]


def assert_same(first: Cache, second: Cache) -> None:
    assert first.lengths == second.lengths
    for row in range(len(first.rows)):
        for mine, yours in zip(held(first, row), held(second, row), strict=True):
            torch.testing.assert_close(mine, yours, atol=2e-5, rtol=2e-5)


def logits(model: DiffusionGemma, cache: Cache) -> Tensor:
    return model.denoise(tokens((len(cache.rows), CONFIG.canvas_length), CONFIG.vocab_size, 9), cache)


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 5, 11, 16, 60, 61])
def test_any_chunk_of_encode_gives_the_same_cache(model, monkeypatch, chunk):
    whole = encoded(model, prompt(LONG), prompt(LONG - 7, 1))
    causal = model.encode([prompt(LONG), prompt(LONG - 7, 1)], model.new_cache(2), logits=True)
    monkeypatch.setattr(network, "CHUNK", chunk)
    assert_same(encoded(model, prompt(LONG), prompt(LONG - 7, 1)), whole)
    pieces = model.encode([prompt(LONG), prompt(LONG - 7, 1)], model.new_cache(2), logits=True)
    for mine, yours in zip(pieces, causal, strict=True):
        torch.testing.assert_close(mine, yours, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sizes", [(1,) * LONG, (60, 1), (1, 60), (4,) * 15 + (1,), (13, 3, 25, 20), (0, 30, 0, 31)])
def test_any_number_of_calls_gives_the_same_cache(model, sizes):
    cache = model.new_cache()
    for piece in prompt(LONG).split(sizes):
        model.encode([piece], cache)
    assert_same(cache, encoded(model, prompt(LONG)))
    torch.testing.assert_close(logits(model, cache), logits(model, encoded(model, prompt(LONG))), atol=1e-4, rtol=1e-4)


def test_the_last_chunk_of_the_real_size(model):
    """CHUNK as it is: a prompt over its edge equals one encoded in other pieces."""
    length = network.CHUNK + 3
    cache = model.new_cache()
    for piece in prompt(length).split(400):
        model.encode([piece], cache)
    assert_same(encoded(model, prompt(length)), cache)


def test_rows_of_a_batch_equal_the_same_rows_alone(model):
    lengths = (LONG, 1, 12, LONG, 4, 30)
    rows = [prompt(length, seed) for seed, length in enumerate(lengths)]
    together = encoded(model, *rows)
    canvas = tokens((len(rows), CONFIG.canvas_length), CONFIG.vocab_size, 9)
    generator = torch.Generator().manual_seed(0)
    previous = 3 * torch.randn(len(rows), CONFIG.canvas_length, CONFIG.vocab_size, generator=generator)
    first, conditioned = model.denoise(canvas, together), model.denoise(canvas, together, previous)
    causal = model.encode(rows, model.new_cache(len(rows)), logits=True)
    for i, row in enumerate(rows):
        alone = encoded(model, row)
        part = canvas[i : i + 1]
        torch.testing.assert_close(first[i], model.denoise(part, alone)[0], atol=1e-4, rtol=1e-4)
        again = model.denoise(part, alone, previous[i : i + 1])
        torch.testing.assert_close(conditioned[i], again[0], atol=1e-4, rtol=1e-4)
        (logits_alone,) = model.encode([row], model.new_cache(), logits=True)
        torch.testing.assert_close(causal[i], logits_alone, atol=1e-4, rtol=1e-4)


def test_denoise_leaves_the_cache_as_it_is(model):
    cache = encoded(model, prompt(30), prompt(7, 1))
    before, lengths = pages(cache), cache.lengths
    first = logits(model, cache)
    assert torch.equal(first, logits(model, cache))
    assert pages(cache) == before
    assert cache.lengths == lengths


def test_denoise_after_more_tokens_reads_them(model):
    """What a canvas gathered from the cache is not what it reads after a commit."""
    cache = encoded(model, prompt(20))
    before = logits(model, cache)
    model.encode([prompt(4, 5)], cache)
    after = logits(model, cache)
    fresh = encoded(model, torch.cat((prompt(20), prompt(4, 5))))
    torch.testing.assert_close(after, logits(model, fresh), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(before, after, atol=1e-2)


@pytest.mark.parametrize("length", [20, 22])
def test_a_reused_cache_is_bitwise_unchanged(model, length):
    """With its last page full (20) and begun (22)."""
    cache = encoded(model, prompt(length))
    before, seen = pages(cache), logits(model, cache)
    options = GenerationConfig(max_new_tokens=12, max_denoising_steps=3, eos_token_id=(10**6,))
    answers = []
    for _ in range(2):
        request = blocks.Request(prompt(5, 2), options, Noise(3, CONFIG.vocab_size, CONFIG.canvas_length))
        *_, last = blocks.generate(model, [request], cache)
        answers.append((last.tokens, last.prompt_tokens))
    assert pages(cache) == before
    assert cache.lengths == [length]
    assert torch.equal(logits(model, cache), seen)
    assert answers[0] == answers[1]
    assert answers[0][1] == length + 5


def test_fork_continues_and_leaves_its_source(model):
    source = encoded(model, prompt(22), prompt(9, 1))
    before = pages(source)
    fork = source.fork([1, 0, 0])
    assert fork.lengths == [9, 22, 22]
    tails = [prompt(6, 11), prompt(6, 12), prompt(3, 13)]
    model.encode(tails, fork)
    assert pages(source) == before
    wholes = [(prompt(9, 1), tails[0]), (prompt(22), tails[1]), (prompt(22), tails[2])]
    assert_same(fork, encoded(model, *(torch.cat(whole) for whole in wholes)))


def test_fork_shares_full_pages_only(model):
    source = encoded(model, prompt(22))
    alone = source.nbytes
    assert alone == bytes_by_hand(22)
    fork = source.fork()
    shared = [a is b for a, b in zip(source.rows[0].pages[FULL], fork.rows[0].pages[FULL], strict=True)]
    assert shared == [True] * 5 + [False]
    both = Cache(CONFIG, 0, source.dtype, source.device)
    both.rows = [*source.rows, *fork.rows]
    begun = sum(PER_TOKEN.values()) * CONFIG.canvas_length
    assert both.nbytes == alone + begun


def test_select_encodes_into_the_same_rows(model):
    cache = encoded(model, prompt(22), prompt(9, 1), prompt(5, 2))
    part = cache.select([2, 0])
    assert part.lengths == [5, 22]
    model.encode([prompt(4, 7), prompt(8, 8)], part)
    assert cache.lengths == [30, 9, 9]
    wholes = (torch.cat((prompt(22), prompt(8, 8))), prompt(9, 1), torch.cat((prompt(5, 2), prompt(4, 7))))
    assert_same(cache, encoded(model, *wholes))
    alone = logits(model, encoded(model, prompt(9, 1)))[0]
    torch.testing.assert_close(logits(model, cache.select([1]))[0], alone, atol=2e-4, rtol=1e-3)
    assert cache.select([0, 1, 2]) is cache


def test_some_rows_of_what_was_read_are_not_gathered_again(model, monkeypatch):
    """A batch that loses a row at every step reads its pages once; a row that has grown since is read anew."""
    prompts = [prompt(20, seed) for seed in range(4)]
    cache = encoded(model, *prompts)
    canvas = tokens((4, CONFIG.canvas_length), CONFIG.vocab_size, 9)
    whole = model.denoise(canvas, cache)
    gathered = []
    joined = Cache._joined
    monkeypatch.setattr(Cache, "_joined", lambda *a: gathered.append(1) or joined(*a))
    for rows in ([0, 1, 3], [1, 3], [3]):
        torch.testing.assert_close(model.denoise(canvas[rows], cache.select(rows)), whole[rows], atol=2e-5, rtol=2e-5)
    assert not gathered
    model.encode([torch.tensor([]), torch.tensor([]), torch.tensor([]), prompt(3, 5)], cache)
    alone = encoded(model, torch.cat((prompts[3], prompt(3, 5))))
    found = model.denoise(canvas[[1, 3]], cache.select([1, 3]))
    torch.testing.assert_close(found[1:], model.denoise(canvas[3:], alone), atol=2e-5, rtol=2e-5)


def test_wrong_numbers_of_rows_are_named(model):
    cache = encoded(model, prompt(4))
    with pytest.raises(ValueError, match="encode got 2 rows of tokens for a cache of 1"):
        model.encode([prompt(3), prompt(3)], cache)
    with pytest.raises(ValueError, match="denoise got 2 rows of canvas for a cache of 1"):
        model.denoise(tokens((2, 4), 50, 0), cache)


PER_TOKEN = {FULL: 2 * 2 * 1 * 16 * 4, SLIDING: 3 * 2 * 2 * 8 * 4}
"""By hand: 2 full layers of 1 x 16 and 3 sliding layers of 2 x 8, keys and values, 4 bytes each."""


def bytes_by_hand(length: int) -> int:
    """By hand: pages of 4 tokens; a sliding page goes when all of it is 11 or more tokens back."""
    held_pages = -(-length // 4)
    gone = max(0, (length - 10) // 4)
    return 4 * (PER_TOKEN[FULL] * held_pages + PER_TOKEN[SLIDING] * (held_pages - gone))


def test_bytes_held_follow_the_arithmetic(model):
    """Full layers grow with the prefix, sliding layers stop at the window."""
    cache, sliding, full = model.new_cache(), [], []
    for length in range(1, 5 * CONFIG.sliding_window):
        model.encode([prompt(1, length)], cache)
        assert cache.nbytes == bytes_by_hand(length) == CONFIG.cache_bytes(length, 4)
        sliding.append(sum(p.nbytes for p in cache.rows[0].pages[SLIDING] if p is not None))
        full.append(sum(p.nbytes for p in cache.rows[0].pages[FULL] if p is not None))
    assert full == [4 * PER_TOKEN[FULL] * -(-n // 4) for n in range(1, 5 * CONFIG.sliding_window)]
    most = PER_TOKEN[SLIDING] * (CONFIG.prefix_window + 2 * CONFIG.canvas_length)
    assert max(sliding) == max(sliding[-CONFIG.canvas_length :]) <= most
    rows = encoded(model, prompt(22), prompt(9))
    assert rows.nbytes == bytes_by_hand(22) + bytes_by_hand(9)


def test_bytes_follow_the_dtype(model):
    cache = Cache(CONFIG, 1, torch.bfloat16, torch.device("cpu"))
    cache.reserve(0, 9)
    assert cache.nbytes == bytes_by_hand(9) // 2 == CONFIG.cache_bytes(9, 2)


def test_bytes_of_the_released_model_at_256k(shared):
    config = ModelConfig.from_file(shared / "config.json")
    sizes = config.cache_bytes_per_token(2)
    assert sizes[FULL] == 5 * 2 * 2 * 512 * 2 == 20_480
    assert sizes[SLIDING] == 25 * 2 * 8 * 256 * 2 == 204_800
    # 1024 pages of 256 in the full layers: 5 GiB; the sliding layers hold the 1023 last tokens, in 4 pages.
    tokens_at_end = 262_144
    assert config.cache_bytes(tokens_at_end, 2) == 20_480 * 262_144 + 204_800 * 1024
    assert 20_480 * 262_144 == 5 << 30
    assert config.cache_bytes(1, 2) == (20_480 + 204_800) * 256
    assert config.cache_bytes(1024, 2) == (20_480 + 204_800) * 1024
    assert config.cache_bytes(1025, 2) == 20_480 * 1280 + 204_800 * 1280
    assert config.cache_bytes(0, 2) == 0
