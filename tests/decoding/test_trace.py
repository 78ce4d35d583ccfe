"""Traces: what is read equals what was written, and a file that was cut or spoilt gives what is left of it."""

import base64
import io
import json
import zlib
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import dgemma
from dgemma import embedded
from dgemma.decoding.events import Block, Event, Finished, Prefilled, Step
from dgemma.decoding.noise import Noise
from dgemma.decoding.trace import Header, Token, Writer, read, to_json

HEADER = Header("made-up", 262_144, 5, {"seed": 1, "eos_token_id": [1]}, 7, [2, 3])

ids = st.integers(0, HEADER.vocab_size - 1)
numbers = st.floats(0, 1e6)
counts = st.integers(0, 2**31)
rows = st.integers(0, 3)


@st.composite
def steps(draw: st.DrawFn) -> Step:
    size = HEADER.canvas_length
    canvas = st.lists(ids, min_size=size, max_size=size).map(torch.tensor)
    accepted = st.lists(st.booleans(), min_size=size, max_size=size).map(torch.tensor)
    entropy = st.lists(st.floats(0, 16, width=32), min_size=size, max_size=size).map(torch.tensor)
    of_row = (draw(rows), draw(counts), draw(counts), draw(numbers))
    return Step(*of_row, draw(canvas), draw(canvas), draw(accepted), draw(entropy), draw(numbers), draw(st.booleans()))


texts = st.lists(ids, max_size=5)
events = st.one_of(
    steps(),
    st.builds(Prefilled, rows, counts, counts, numbers),
    st.builds(Block, rows, counts, texts, counts, st.booleans(), numbers),
    st.builds(
        Finished,
        rows,
        texts,
        st.sampled_from(["stop", "length"]),
        st.lists(counts, max_size=3),
        st.lists(st.booleans(), max_size=3),
        counts,
        numbers,
        numbers,
        numbers,
    ),
)


def written(made: list[Event], header: Header = HEADER) -> bytes:
    file = io.BytesIO()
    writer = Writer(file, header, lambda i: Token(i, f"«{i}»"))
    for event in made:
        writer.write(event)
    return file.getvalue()


def assert_same(one: Event, other: Event) -> None:
    assert type(one) is type(other)
    for f in fields(one):
        a, b = getattr(one, f.name), getattr(other, f.name)
        if f.type is Tensor:
            assert a.dtype == b.dtype
            assert torch.equal(a.half().float() if f.name == "entropy" else a, b)
        else:
            assert a == b


@pytest.fixture(scope="module")
def run() -> list[Event]:
    """A real generation."""
    if "sudoku" not in embedded.names():
        pytest.skip("the embedded Sudoku model is not there")
    puzzle = "53..7.912 6..195..8 198...567 .5.76..23 4.68.3.91 7.39.4..6 9615..284 2.74196.5 3..28.1.9"
    lm = dgemma.load("sudoku")
    return list(lm.stream(lm.task.prepare(puzzle), max_denoising_steps=6))


@pytest.fixture(scope="module")
def run_header(run: list[Event]) -> Header:
    return replace(HEADER, canvas_length=len(next(event for event in run if isinstance(event, Step)).best))


@settings(max_examples=60, deadline=None)
@given(made=st.lists(events, max_size=8))
def test_what_is_read_equals_what_was_written(made: list[Event], tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.getbasetemp() / "any.trace"
    path.write_bytes(written(made))
    trace = read(path)
    assert trace.header == HEADER
    assert len(trace.events) == len(made)
    for one, other in zip(made, trace.events, strict=True):
        assert_same(one, other)
    shown = [e.best.tolist() if isinstance(e, Step) else e.tokens for e in made if not isinstance(e, Prefilled)]
    assert trace.tokens == {i: Token(i, f"«{i}»") for i in {2, 3}.union(*shown)}
    whole = bool(made) and {e.row for e in made} == {e.row for e in made if isinstance(e, Finished)}
    assert (trace.problem is None) == whole


def test_a_real_generation(run: list[Event], run_header: Header, tmp_path: Path):
    path = tmp_path / "run.trace"
    path.write_bytes(written(run, run_header))
    trace = read(path)
    assert trace.problem is None
    assert len(trace.events) == len(run)
    for one, other in zip(run, trace.events, strict=True):
        assert_same(one, other)


def test_a_step_by_the_page_that_describes_it(run: list[Event], run_header: Header):
    """Decoded with nothing but docs/trace.md."""
    size = run_header.canvas_length
    best = np.zeros(size, np.uint32)
    lines = [json.loads(line) for line in written(run, run_header).splitlines()]
    packed = [line["canvas"] for line in lines if line.get("kind") == "step"]
    expected = [event for event in run if isinstance(event, Step)]
    for text, step in zip(packed, expected, strict=True):
        data = zlib.decompress(base64.b64decode(text))
        assert len(data) == 10 * size + -(-size // 8)
        plane = [np.frombuffer(data[i * size : (i + 1) * size], np.uint8).astype(np.uint32) for i in range(10)]
        best ^= plane[0] | plane[1] << 8 | plane[2] << 16 | plane[3] << 24
        canvas = best ^ (plane[4] | plane[5] << 8 | plane[6] << 16 | plane[7] << 24)
        entropy = (plane[8] | plane[9] << 8).astype(np.uint16)
        bits = "".join(f"{byte:08b}" for byte in data[10 * size :])
        assert best.tolist() == step.best.tolist()
        assert canvas.tolist() == step.canvas.tolist()
        assert entropy.view(np.float16).tolist() == step.entropy.half().tolist()
        assert [bit == "1" for bit in bits[:size]] == step.accepted.tolist()


def test_each_event_is_in_the_file_before_the_next(run: list[Event], run_header: Header, tmp_path: Path):
    path = tmp_path / "growing.trace"
    with path.open("wb") as file:
        writer = Writer(file, run_header)
        for count, event in enumerate(run, 1):
            writer.write(event)
            assert len(read(path).events) == count


def test_a_canvas_of_256_takes_about_a_kilobyte(tmp_path: Path):
    """Release sizes: 40 steps that settle a canvas evenly, a tenth of the unsettled tokens changing each time."""
    size, count, generator = 256, 40, np.random.default_rng(0)
    header = replace(HEADER, canvas_length=size)
    noise = Noise(0, header.vocab_size, size)
    best, made = torch.randint(header.vocab_size, (size,)), list[Event]()
    for n in range(count):
        accepted = torch.arange(size) < size * (n + 1) // count
        entropy = torch.where(accepted, 1e-4, 2.0) * torch.from_numpy(generator.random(size, np.float32))
        best = torch.where(accepted | (torch.rand(size) > 0.1), best, noise.renoise(1, n + 1))
        canvas = torch.where(accepted, best, noise.renoise(0, n + 1))
        made.append(Step(0, 0, n + 1, 0.8 - n / 100, best, canvas, accepted, entropy, float(entropy.mean()), False))
    file = io.BytesIO()
    writer = Writer(file, header)
    for event in made:
        writer.write(event)
    assert file.tell() / count < 1400


def test_cut_at_every_byte(tmp_path: Path):
    def step(number: int, best: list[int]) -> Step:
        tokens, accepted = torch.tensor(best), torch.tensor(best) > 3
        return Step(0, 0, number, 0.75, tokens, tokens + 1, accepted, torch.rand(5), 0.5, False)

    moments = [step(1, [9, 300, 2, 1, 70_000]), step(2, [9, 300, 5, 1, 70_000])]
    ending = [Block(0, 0, [9, 300], 2, True, 0.5), Finished(0, [9, 300], "stop", [2], [True], 2, 0.1, 0.5, 0.1)]
    whole = written([Prefilled(0, 2, 0, 0.1), *moments, *ending])
    path = tmp_path / "cut.trace"
    head = whole.index(b"\n")
    path.write_bytes(whole)
    expected = read(path).events
    ends = [i for i in range(len(whole)) if whole[i] == ord("\n")]
    kinds = [json.loads(line).get("kind") for line in whole.splitlines()]
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        if length < head:
            with pytest.raises(ValueError, match="not a trace"):
                read(path)
            continue
        trace = read(path)
        complete = sum(end <= length for end in ends)  # a line is complete without its line break
        assert len(trace.events) == sum(kind not in (None, "tokens") for kind in kinds[:complete])
        for one, other in zip(expected, trace.events, strict=False):
            assert_same(one, other)
        assert (trace.problem is None) == (complete == len(ends))


@settings(max_examples=150, deadline=None)
@given(place=st.integers(0, 10**6), value=st.integers(0, 255))
def test_a_spoilt_byte_is_never_worse_than_a_clear_error(
    place: int, value: int, run: list[Event], run_header: Header, tmp_path_factory: pytest.TempPathFactory
):
    whole = written(run[:3], run_header)
    data = bytearray(whole)
    data[place % len(data)] = value
    path = tmp_path_factory.getbasetemp() / "spoilt.trace"
    path.write_bytes(data)
    if place % len(data) <= whole.index(b"\n"):
        with suppress(ValueError):
            read(path)
    else:
        trace = read(path)
        assert len(trace.events) <= 3
        assert trace.problem


@pytest.mark.parametrize(
    "line",
    [
        '{"kind": "step"}',
        '{"kind": "block", "row": 0, "block": 0, "tokens": ["a"], "steps": 1, "converged": true, "denoise_seconds": 0}',
        '{"kind": "prefilled", "row": true, "tokens": 1, "cached": 0, "seconds": 0}',
        '{"kind": "later", "row": 0}',
        '{"kind": ["step"]}',
        '{"kind": "tokens", "tokens": [[1, "a", "noun"]]}',
        '{"kind": "tokens", "tokens": [[1]]}',
        "[]",
        "12",
        "",
        "[" * 100_000,
    ],
)
def test_a_damaged_line_ends_the_trace_and_is_named(line: str, tmp_path: Path):
    path = tmp_path / "damaged.trace"
    first, last = Prefilled(0, 1, 0, 0.5), Prefilled(1, 1, 0, 0.5)
    lines = written([first, last]).decode().splitlines()
    lines[-1:-1] = [line]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    trace = read(path)
    assert trace.events == [first]
    assert trace.problem == f"{path}: line 4 is cut or damaged; 1 events are read"


def test_a_bomb_is_not_inflated(tmp_path: Path):
    path = tmp_path / "bomb.trace"
    step = {"kind": "step", "row": 0, "block": 0, "step": 1, "temperature": 1, "mean_entropy": 1, "still": False}
    bomb = base64.b64encode(zlib.compress(bytes(1 << 24))).decode()
    path.write_bytes(written([]) + json.dumps({**step, "canvas": bomb}).encode())
    assert "line 3" in str(read(path).problem)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not a trace"),
        ("hello\n", "not a trace"),
        ("[1]\n", "not a trace"),
        ('{"format": "other", "version": 1}\n', "not a trace"),
        ('{"format": "dgemma-trace", "version": 2}\n', "version 2; this program reads version 1"),
        ('{"format": "dgemma-trace"}\n', "version None"),
        ('{"format": "dgemma-trace", "version": 1, "model": 3}\n', "header is damaged: model is 3"),
    ],
)
def test_what_is_no_trace_is_refused(content: str, message: str, tmp_path: Path):
    path = tmp_path / "no.trace"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_a_canvas_of_another_length_is_refused(run: list[Event]):
    with pytest.raises(ValueError, match="in a trace of 5"):
        written(run)


def test_events_as_json(run: list[Event]):
    step = next(event for event in run if isinstance(event, Step))
    values = json.loads(json.dumps(to_json(step)))
    assert values["event"] == "step"
    assert values["best"] == step.best.tolist()
    assert values["accepted"] == step.accepted.tolist()
    assert values["entropy"] == pytest.approx(step.entropy.tolist())
    assert set(values) == {"event", *(f.name for f in fields(Step))}
