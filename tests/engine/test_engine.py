"""The engine's thread: many callers at once, an end for every request, and a life after an error."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from dgemma.decoding.events import Block, Event, Finished
from dgemma.engine.engine import Closed, Engine
from dgemma.engine.scheduler import Limits, QueueFull
from dgemma.model.network import DiffusionGemma
from tests.engine.test_scheduler import Listener, alone, assert_same, network, request


@pytest.fixture(scope="module")
def model() -> DiffusionGemma:
    return network()


class Waiting(Listener):
    """A listener that another thread can wait for, and that can hold the engine at its first event."""

    def __init__(self, hold: bool = False) -> None:
        super().__init__()
        self.begun, self.go_on, self.over = threading.Event(), threading.Event(), threading.Event()
        if not hold:
            self.go_on.set()

    def take(self, event: Event) -> None:
        self.events.append(event)
        self.begun.set()
        assert self.go_on.wait(10)

    def ended(self, error: Exception | None) -> None:
        self.errors.append(error)
        self.over.set()


def test_threads_submit_together_and_each_gets_its_own(model: DiffusionGemma) -> None:
    with Engine(model, Limits(rows=3)) as engine, ThreadPoolExecutor(6) as threads:
        got = list(threads.map(lambda seed: engine.generate(request(seed, 5 + seed)), range(12)))
    for seed, finished in enumerate(got):
        assert_same(finished, alone(model, request(seed, 5 + seed)))


def test_a_stream_is_that_of_one_alone_and_leaving_it_cancels(model: DiffusionGemma) -> None:
    with Engine(model) as engine:
        events = list(engine.stream(request(1, 6)))
        assert isinstance(events[-1], Finished)
        assert_same(events[-1], alone(model, request(1, 6)))
        stream = engine.stream(request(2, 6, new=400, steps=40))
        next(stream)
        stream.close()
        assert_same(engine.generate(request(3, 4)), alone(model, request(3, 4)))
        assert not engine.scheduler.running


def test_close_drains_or_drops(model: DiffusionGemma) -> None:
    engine, kept = Engine(model), Waiting()
    engine.submit(request(1, 5), kept.take, kept.ended)
    engine.close()
    assert_same(kept.finished, alone(model, request(1, 5)))

    engine, dropped = Engine(model), Waiting(hold=True)
    engine.submit(request(2, 5, new=400), dropped.take, dropped.ended)
    assert dropped.begun.wait(10)
    closing = threading.Thread(target=engine.close, kwargs={"drain": False})
    closing.start()
    dropped.go_on.set()
    closing.join(10)
    assert not closing.is_alive()
    assert dropped.errors == [None]
    assert not isinstance(dropped.events[-1], Finished)


def test_after_close_nothing_is_taken(model: DiffusionGemma) -> None:
    engine = Engine(model)
    engine.close()
    for late in (lambda: engine.generate(request(1, 5)), lambda: engine.run(int)):
        with pytest.raises(Closed, match="no more requests"):
            late()


def test_an_error_in_a_step_ends_all_and_the_engine_goes_on(
    model: DiffusionGemma, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine(model) as engine:
        broken = [Waiting(), Waiting()]

        def fail() -> None:
            raise MemoryError("the accelerator is gone")

        with monkeypatch.context() as patch:
            patch.setattr(engine.scheduler, "step", fail)
            engine.submit_all([(request(n, 5), each.take, each.ended) for n, each in enumerate(broken)])
            assert all(each.over.wait(10) for each in broken)
        assert [str(each.errors[0]) for each in broken] == ["the accelerator is gone"] * 2
        assert_same(engine.generate(request(3, 4)), alone(model, request(3, 4)))


def test_all_or_none_are_queued(model: DiffusionGemma) -> None:
    with Engine(model, Limits(rows=1, waiting=3)) as engine:
        first, others = Waiting(hold=True), [Waiting() for _ in range(4)]
        engine.submit(request(0, 5), first.take, first.ended)
        assert first.begun.wait(10)
        asked = [(request(n, 5), each.take, each.ended) for n, each in enumerate(others)]
        with pytest.raises(ValueError, match="4 answers"):
            engine.submit_all(asked)
        engine.submit_all(asked[:2])
        with pytest.raises(QueueFull, match="2 requests are waiting"):
            engine.submit_all(asked[2:])
        assert len(engine.scheduler.jobs()) == 3
        first.go_on.set()
    assert [bool(each.events) for each in others] == [True, True, False, False]


def test_functions_run_between_steps_on_the_engines_thread(model: DiffusionGemma) -> None:
    with Engine(model) as engine:
        assert engine.run(lambda: threading.current_thread().name).result(10) == "dgemma-engine"
        with pytest.raises(ZeroDivisionError):
            engine.run(lambda: 1 // 0).result(10)
        stream = engine.stream(request(1, 5, new=40))
        seen = [engine.run(lambda: len(engine.scheduler.running)).result(10) for _ in stream]
        assert seen[0] == 1, "a function need not wait for the requests in work"
        assert isinstance(engine.generate(request(2, 5)), Finished)
        assert any(isinstance(event, Block) for event in engine.stream(request(3, 5)))
