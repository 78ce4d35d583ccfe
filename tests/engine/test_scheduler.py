"""The scheduler: what a row says never depends on its neighbours, and nothing is left over."""

import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dgemma.config import FULL, SLIDING, GenerationConfig, ModelConfig
from dgemma.decoding.blocks import Request, generate
from dgemma.decoding.events import Block, Event, Finished, Prefilled, Step
from dgemma.decoding.noise import Noise
from dgemma.engine.scheduler import Job, Limits, QueueFull, Scheduler
from dgemma.model.network import DiffusionGemma
from tests.parity.reference import randomise

CONFIG = ModelConfig(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=16,
    moe_intermediate_size=8,
    num_experts=3,
    top_k_experts=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    num_global_key_value_heads=1,
    global_head_dim=16,
    layer_types=(SLIDING, FULL),
    sliding_window=12,
    canvas_length=4,
    max_position_embeddings=512,
    dtype="float32",
)


def network() -> DiffusionGemma:
    model = DiffusionGemma(CONFIG).eval()
    randomise(model, 0)
    return model


@pytest.fixture(scope="module")
def model() -> DiffusionGemma:
    return network()


def request(seed: int, length: int, new: int = 10, steps: int = 6, shared: int = 0) -> Request:
    """A prompt of `length` tokens, the first `shared` of which all requests have."""
    own = torch.randint(CONFIG.vocab_size, (length,), generator=torch.Generator().manual_seed(seed))
    common = torch.randint(CONFIG.vocab_size, (length,), generator=torch.Generator().manual_seed(999))
    prompt = torch.cat((common[:shared], own[shared:]))
    options = GenerationConfig(max_new_tokens=new, max_denoising_steps=steps, eos_token_id=(1, 7))
    return Request(prompt, options, Noise(seed, CONFIG.vocab_size, CONFIG.canvas_length))


class Listener:
    def __init__(self) -> None:
        self.events: list[Event] = []
        self.errors: list[Exception | None] = []

    @property
    def finished(self) -> Finished:
        assert isinstance(self.events[-1], Finished)
        return self.events[-1]


def submit(scheduler: Scheduler, request: Request, salt: str = "") -> tuple[Job, Listener]:
    listener = Listener()
    return scheduler.submit(request, listener.events.append, listener.errors.append, salt), listener


def run(scheduler: Scheduler) -> None:
    for _ in range(10_000):
        if scheduler.idle:
            return
        scheduler.step()
    raise AssertionError("the scheduler does not come to an end")


def alone(model: DiffusionGemma, request: Request) -> Finished:
    *_, last = generate(model, [request])
    assert isinstance(last, Finished)
    return last


def assert_same(got: Finished, wanted: Finished) -> None:
    assert (got.tokens, got.reason, got.steps, got.converged) == (
        wanted.tokens,
        wanted.reason,
        wanted.steps,
        wanted.converged,
    )


def test_rows_say_the_same_together_as_alone(model: DiffusionGemma) -> None:
    scheduler = Scheduler(model, Limits(rows=3))
    made = [(seed, 1 + 7 * seed % 23, 1 + 3 * seed % 14) for seed in range(8)]
    listeners = [submit(scheduler, request(*each))[1] for each in made]
    run(scheduler)
    for each, listener in zip(made, listeners, strict=True):
        assert_same(listener.finished, alone(model, request(*each)))
        assert listener.errors == [None]
        kinds = [type(event) for event in listener.events]
        assert kinds[0] is Prefilled
        assert kinds.count(Block) == len(listener.finished.steps)
        assert kinds.count(Step) == sum(listener.finished.steps)


def test_a_long_prompt_does_not_hold_others_up(model: DiffusionGemma) -> None:
    scheduler = Scheduler(model, Limits(prefill_tokens=8))
    _, long = submit(scheduler, request(1, 200))
    _, short = submit(scheduler, request(2, 3, new=4))
    while not short.errors:
        scheduler.step()
    assert not long.events, "the short one is done while the long one is still being prefilled"
    run(scheduler)
    assert_same(long.finished, alone(model, request(1, 200)))


def test_a_known_prefix_is_not_encoded_again_and_changes_nothing(model: DiffusionGemma) -> None:
    scheduler = Scheduler(model, Limits())
    _, first = submit(scheduler, request(1, 45, shared=40))
    run(scheduler)
    _, second = submit(scheduler, request(2, 45, shared=40))
    run(scheduler)
    assert isinstance(first.events[0], Prefilled)
    assert isinstance(second.events[0], Prefilled)
    assert (first.events[0].cached, second.events[0].cached) == (0, 40)
    assert second.events[0].tokens == 5
    assert second.finished.prompt_tokens == 45
    assert_same(second.finished, alone(model, request(2, 45, shared=40)))


@pytest.mark.parametrize("kept", [1 << 20, 0])
def test_prompts_that_begin_alike_and_come_together_are_encoded_once(model: DiffusionGemma, kept: int) -> None:
    scheduler = Scheduler(model, Limits(prefix_bytes=kept, prefill_tokens=16))
    asked = [request(seed, length, shared=40) for seed, length in ((1, 45), (2, 45), (3, 40), (4, 60), (5, 7))]
    listeners = [submit(scheduler, one)[1] for one in asked]
    run(scheduler)
    told = [listener.events[0] for listener in listeners]
    assert all(isinstance(event, Prefilled) for event in told)
    # Whole pages of 4; a prompt that is known to its end keeps a last token to begin with.
    assert [event.cached for event in told] == ([0, 40, 36, 40, 4] if kept else [0] * 5)
    for one, listener in zip(asked, listeners, strict=True):
        again = Request(one.prompt, one.options, one.noise)
        assert_same(listener.finished, alone(model, again))


def test_the_next_turn_finds_what_was_committed(model: DiffusionGemma) -> None:
    scheduler = Scheduler(model, Limits())
    asked = request(3, 9, new=16)
    _, first = submit(scheduler, asked)
    run(scheduler)
    said = first.finished.tokens
    assert len(said) > 8
    again = Request(torch.cat((asked.prompt, torch.tensor(said), torch.tensor([5, 6]))), asked.options, asked.noise)
    _, second = submit(scheduler, again)
    run(scheduler)
    assert isinstance(second.events[0], Prefilled)
    assert second.events[0].cached == (9 + len(said) - 4) // 4 * 4 or second.events[0].cached >= 12


def test_salt_parts_tenants(model: DiffusionGemma) -> None:
    scheduler = Scheduler(model, Limits())
    for salt, cached in (("a", 0), ("b", 0), ("a", 40)):
        _, listener = submit(scheduler, request(1, 45), salt)
        run(scheduler)
        assert isinstance(listener.events[0], Prefilled)
        assert min(40, listener.events[0].cached) == cached


def test_the_prefix_cache_is_bounded_and_forgets_the_oldest(model: DiffusionGemma) -> None:
    one = model.config.cache_bytes(4, 4)
    scheduler = Scheduler(model, Limits(prefix_bytes=12 * one))
    for seed in (1, 2, 3, 1):
        _, listener = submit(scheduler, request(seed, 21, new=1))
        run(scheduler)
        assert scheduler.prefixes.nbytes <= 12 * one
        assert isinstance(listener.events[0], Prefilled)
    assert listener.events[0].cached < 20, "the first was partly forgotten"
    _, listener = submit(scheduler, request(3, 21, new=1))
    run(scheduler)
    assert isinstance(listener.events[0], Prefilled)
    assert listener.events[0].cached > 0


def test_a_cancelled_row_is_free_after_one_step(model: DiffusionGemma) -> None:
    scheduler = Scheduler(model, Limits(rows=1))
    job, listener = submit(scheduler, request(1, 5, new=400))
    _, other = submit(scheduler, request(2, 5, new=4))
    for _ in range(3):
        scheduler.step()
    scheduler.cancel(job)
    scheduler.step()
    assert job not in scheduler.running
    assert listener.errors == [None]
    run(scheduler)
    assert_same(other.finished, alone(model, request(2, 5, new=4)))


def test_what_does_not_fit_is_refused_and_what_fits_later_waits(model: DiffusionGemma) -> None:
    need = model.config.cache_bytes(8 + 12, 4)
    scheduler = Scheduler(model, Limits(waiting=2, cache_bytes=int(1.5 * need)))
    with pytest.raises(ValueError, match="MiB of cache"):
        submit(scheduler, request(1, 100))
    with pytest.raises(ValueError, match="positions"):
        submit(Scheduler(model, Limits()), request(1, 600))
    with pytest.raises(ValueError, match="empty"):
        submit(scheduler, request(1, 0))
    submit(scheduler, request(1, 8))
    scheduler.step()
    listeners = [submit(scheduler, request(seed, 8))[1] for seed in (2, 3)]
    with pytest.raises(QueueFull, match="2 requests are waiting"):
        submit(scheduler, request(4, 8))
    scheduler.step()
    assert len(scheduler.running) == 1, "memory for two is not there"
    run(scheduler)
    assert all(listener.errors == [None] for listener in listeners)


class Broken(Noise):
    """Fails in its third step."""

    def uniform(self, block: int, step: int) -> torch.Tensor:
        if step == 3:
            raise OSError("the recording ends here")
        return super().uniform(block, step)


def test_an_error_ends_its_own_row_alone(model: DiffusionGemma) -> None:
    scheduler = Scheduler(model, Limits())
    bad = request(1, 5)
    bad.noise = Broken(1, CONFIG.vocab_size, 4)
    _, broken = submit(scheduler, bad)
    _, good = submit(scheduler, request(2, 6))
    deaf = Listener()

    def fail(event: Event) -> None:
        raise ValueError("nobody listens")

    scheduler.submit(request(3, 4), fail, deaf.errors.append)
    run(scheduler)
    assert [str(error) for error in broken.errors] == ["the recording ends here"]
    assert [str(error) for error in deaf.errors] == ["nobody listens"]
    assert_same(good.finished, alone(model, request(2, 6)))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**6))
def test_random_traffic_leaves_nothing_over(model: DiffusionGemma, seed: int) -> None:
    rng = random.Random(seed)
    limits = Limits(
        rows=rng.randint(1, 5),
        prefill_tokens=rng.choice((1, 8, 64)),
        prefix_bytes=rng.choice((0, 3000, 1 << 20)),
        cache_bytes=rng.choice((40_000, 1 << 20)),
    )
    scheduler = Scheduler(model, limits)
    plans = [(n, rng.randint(1, 60), rng.randint(1, 12), rng.randint(1, 6), rng.choice((0, 1, 20))) for n in range(9)]
    sent: list[tuple[tuple, Job, Listener]] = []
    cancelled: list[Job] = []
    while plans or not scheduler.idle:
        if plans and rng.random() < 0.4:
            n, length, *rest = plans.pop()
            plan = (n, length, *rest[:2], min(length, rest[2]))
            sent.append((plan, *submit(scheduler, request(*plan))))
        if sent and rng.random() < 0.1:
            job = rng.choice(sent)[1]
            scheduler.cancel(job)
            cancelled.append(job)
        scheduler.step()
        assert len(scheduler.running) <= limits.rows
        assert scheduler.nbytes <= limits.cache_bytes
    assert not scheduler.running
    assert not scheduler.waiting
    for plan, job, listener in sent:
        assert listener.errors == [None], "every request ends once"
        if job not in cancelled:
            assert_same(listener.finished, alone(model, request(*plan)))
