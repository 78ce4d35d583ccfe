"""Processes that answer questions, and how they fail."""

import os

import pytest

from dgemma.bench.harness import Side, Spread, peak_bytes

MODULE = """
import os, sys

class Echo:
    def __init__(self, word):
        if word == "refuse":
            raise ValueError("no such word: refuse")
        print("what a library prints is no answer")
        self.word = word

    def repeat(self, times):
        print("nor is this")
        return [self.word] * times

    def pid(self):
        return os.getpid()

    def variable(self, name):
        return os.environ.get(name)

    def die(self):
        raise RuntimeError("out of words")
"""


@pytest.fixture(autouse=True)
def _module(tmp_path, monkeypatch):
    (tmp_path / "echo_side.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))


def test_a_side_answers_from_a_process_of_its_own():
    with Side("echo", "echo_side:Echo", {"word": "ä\n"}, env={"MALLOC_MMAP_MAX_": "0"}) as side:
        assert side.ready_s > 0
        assert side.ask("repeat", times=3) == ["ä\n"] * 3
        pid = side.ask("pid")
        assert pid == side.ask("pid") != os.getpid()
        assert side.ask("variable", name="MALLOC_MMAP_MAX_") == "0"
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    side.close()


def test_a_side_that_ends_says_why():
    with pytest.raises(OSError, match="the process of echo ended: ValueError: no such word: refuse"):
        Side("echo", "echo_side:Echo", {"word": "refuse"})
    with Side("echo", "echo_side:Echo", {"word": "a"}) as side:
        for _ in range(2):
            with pytest.raises(OSError, match="the process of echo ended: RuntimeError: out of words"):
                side.ask("die")


def test_spread_is_median_least_and_most():
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    assert Spread.of([4.0, 1.0]) == Spread(2.5, 1.0, 4.0)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the system does not tell peak memory")
def test_peak_memory_grows_with_what_is_held():
    before = peak_bytes()
    held = bytearray(os.urandom(1)) * (before + (64 << 20))
    assert peak_bytes() >= len(held)
    assert before is not None
