"""A generation in a file: written event by event as it happens, read back as the same events; see docs/trace.md.

Of text it knows nothing: how a token reads is what the caller says, kept beside the ids so that a trace needs no model.
"""

import json
import zlib
from base64 import b64decode, b64encode
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, get_args, get_origin

import numpy as np
import torch
from torch import Tensor

from dgemma.decoding.events import Block, Event, Finished, Prefilled, Step

FORMAT, VERSION = "dgemma-trace", 1
EVENTS: dict[str, type[Event]] = {"prefilled": Prefilled, "step": Step, "block": Block, "finished": Finished}
NAMES = {kind: name for name, kind in EVENTS.items()}
OF_REQUEST = ("options", "seed", "prompt_tokens")
"""Fields of the header that a row may have for itself."""

_DAMAGE = (ValueError, LookupError, TypeError, OverflowError, RecursionError, zlib.error)


@dataclass(frozen=True)
class Header:
    """What was asked. options: fields of GenerationConfig, and those of the mode; prompt_tokens: as encoded."""

    model: str
    vocab_size: int
    canvas_length: int
    options: dict[str, Any]
    seed: int
    prompt_tokens: list[int]


class Token(NamedTuple):
    """How a token reads. kind: "text"; "special" for a marker; "byte" for a part of a character, as "<0xE2>"."""

    id: int
    text: str
    kind: str = "text"


@dataclass(frozen=True)
class Trace:
    """A file's content. `problem` says why it holds less than whole generations; None if it does not.

    requests: the rows that have a header of their own; ended: why rows ended that have no Finished, "" if cancelled.
    """

    header: Header
    events: list[Event]
    tokens: dict[int, Token]
    problem: str | None = None
    requests: dict[int, Header] = field(default_factory=dict)
    ended: dict[int, str] = field(default_factory=dict)

    def header_of(self, row: int) -> Header:
        """What was asked in a row."""
        return self.requests.get(row, self.header)


_Before = dict[int, np.ndarray]  # the best canvas of each row's last step, uint32 [C]


class Writer:
    """Appends events to a file; each is flushed, so that a killed run leaves all that happened.

    describe: how a token reads; it is asked once for each token of the prompt, the best canvases and the text.
    """

    def __init__(self, file: BinaryIO, header: Header, describe: Callable[[int], Token] | None = None):
        self.file, self.header, self.describe = file, header, describe
        self._known: set[int] = set()
        self._before: _Before = {}
        self._write({"format": FORMAT, "version": VERSION, **asdict(header)})
        self._introduce(header.prompt_tokens)

    def write(self, event: Event) -> None:
        record = {"kind": NAMES[type(event)]}
        record |= {f.name: getattr(event, f.name) for f in fields(event) if f.type is not Tensor}
        if isinstance(event, Step):
            if len(event.best) != self.header.canvas_length:
                raise ValueError(f"a canvas of {len(event.best)} tokens in a trace of {self.header.canvas_length}")
            self._introduce(event.best.tolist())
            record["canvas"] = _pack(event, self._before)
        elif not isinstance(event, Prefilled):
            self._introduce(event.tokens)
        if isinstance(event, Finished):
            self._before.pop(event.row, None)
        self._write(record)

    def request(self, row: int, options: dict[str, Any], seed: int, prompt_tokens: list[int]) -> None:
        """What the events of a row, which follow, were asked for, where that is not what the header says."""
        self._introduce(prompt_tokens)
        asked = dict(zip(OF_REQUEST, (options, seed, prompt_tokens), strict=True))
        self._write({"kind": "request", "row": row, **asked})

    def ended(self, row: int, error: str) -> None:
        """Ends a row that does not come to Finished; error: "" if it was cancelled."""
        self._before.pop(row, None)
        self._write({"kind": "ended", "row": row, "error": error})

    def _introduce(self, ids: Iterable[int]) -> None:
        new = sorted(set(ids) - self._known)
        if self.describe and new:
            self._known.update(new)
            self._write({"kind": "tokens", "tokens": [self.describe(i) for i in new]})

    def _write(self, record: dict[str, Any]) -> None:
        self.file.write(json.dumps(record, separators=(",", ":")).encode() + b"\n")
        self.file.flush()


def read(path: str | Path) -> Trace:
    """A trace, as far as its file goes: the first damaged line ends it, and is its `problem`.

    Raises ValueError for a file that is no trace, or one of another version.
    """
    events: list[Event] = []
    tokens: dict[int, Token] = {}
    requests: dict[int, Header] = {}
    ended: dict[int, str] = {}
    before: _Before = {}
    problem = None
    with open(path, "rb") as file:
        header = _header(path, file.readline())
        for number, line in enumerate(file, 2):
            try:
                record = json.loads(line)
                match record["kind"]:
                    case "tokens":
                        tokens |= {token.id: token for token in map(_token, record["tokens"])}
                    case "request":
                        requests[_row(record)] = replace(header, **_plain(Header, record, OF_REQUEST))
                    case "ended":
                        ended[_row(record)] = str(record["error"])
                    case _:
                        events.append(_event(record, header.canvas_length, before))
                if record["kind"] in ("finished", "ended"):
                    before.pop(record["row"], None)
            except _DAMAGE:
                problem = f"line {number} is cut or damaged"
                break
    done = {event.row for event in events if isinstance(event, Finished)} | ended.keys()
    if problem is None and ({event.row for event in events} - done or not events):
        problem = "it ends before the generation does"
    told = problem and f"{path}: {problem}; {len(events)} events are read"
    return Trace(header, events, tokens, told, requests, ended)


def to_json(event: Event) -> dict[str, Any]:
    """An event as plain values: its name under "event", tensors as lists."""
    values = {f.name: getattr(event, f.name) for f in fields(event)}
    return {
        "event": NAMES[type(event)],
        **{name: value.tolist() if isinstance(value, Tensor) else value for name, value in values.items()},
    }


def _header(path: str | Path, line: bytes) -> Header:
    try:
        values = json.loads(line)
        known = values["format"] == FORMAT
    except _DAMAGE:
        known = False
    if not known:
        raise ValueError(f"{path}: not a trace: its first line is no {FORMAT} header")
    if values.get("version") != VERSION:
        raise ValueError(f"{path}: a trace of version {values.get('version')!r}; this program reads version {VERSION}")
    try:
        header = Header(**_plain(Header, values))
    except _DAMAGE as error:
        raise ValueError(f"{path}: the trace's header is damaged: {error}") from None
    if header.canvas_length < 1:
        raise ValueError(f"{path}: the trace's header has canvas_length {header.canvas_length}; it is at least 1")
    return header


def _token(item: list[Any]) -> Token:
    token = Token(*item)
    if not (_fits(token.id, int) and _fits(token.text, str) and token.kind in ("text", "special", "byte")):
        raise ValueError(f"{item} is no token")
    return token


def _event(record: dict[str, Any], length: int, before: _Before) -> Event:
    kind = EVENTS[record["kind"]]
    values = _plain(kind, record)
    if kind is Step:
        values |= _unpack(record["canvas"], length, record["row"], before)
    return kind(**values)


def _row(record: dict[str, Any]) -> int:
    if not _fits(record["row"], int):
        raise ValueError(f"row is {record['row']!r}")
    return record["row"]


def _plain(kind: type, record: dict[str, Any], among: Collection[str] | None = None) -> dict[str, Any]:
    """The fields of a dataclass that are no tensors, or those named, if they have the types that it says."""
    known = {f.name: f.type for f in fields(kind) if f.type is not Tensor and (among is None or f.name in among)}
    for name, type_ in known.items():
        if name not in record or not _fits(record[name], type_):
            raise ValueError(f"{name} is {record.get(name)!r}")
    return {name: record[name] for name in known}


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(item, get_args(kind)[0]) for item in value)
    return type(value) in ((int, float) if kind is float else (get_origin(kind) or kind,))


def _pack(step: Step, before: _Before) -> str:
    """A step's tensors, ids as differences by XOR, in planes of bytes, deflated."""
    best, canvas = (ids.numpy().astype("<u4") for ids in (step.best, step.canvas))
    entropy = step.entropy.numpy().astype("<f2")
    planes = [*_planes(best ^ before.get(step.row, 0)), *_planes(canvas ^ best), *_planes(entropy)]
    before[step.row] = best
    deflate = zlib.compressobj(9)
    data = b""
    for plane in (*planes, np.packbits(step.accepted.numpy())):
        data += deflate.compress(plane.tobytes()) + deflate.flush(zlib.Z_BLOCK)  # each has statistics of its own
    return b64encode(data + deflate.flush()).decode()


def _unpack(text: str, length: int, row: int, before: _Before) -> dict[str, Tensor]:
    size = 10 * length + -(-length // 8)
    inflate = zlib.decompressobj()
    data = inflate.decompress(b64decode(text, validate=True), size + 1)
    if len(data) != size or not inflate.eof:
        raise ValueError(f"a step of {len(data)} bytes instead of {size}")
    best = before[row] = _values(data[: 4 * length], "<u4") ^ before.get(row, 0)
    canvas = _values(data[4 * length : 8 * length], "<u4") ^ best
    entropy = _values(data[8 * length : 10 * length], "<f2")
    accepted = np.unpackbits(np.frombuffer(data[10 * length :], np.uint8), count=length)
    return {
        "best": torch.from_numpy(best.astype(np.int64)),
        "canvas": torch.from_numpy(canvas.astype(np.int64)),
        "accepted": torch.from_numpy(accepted.astype(np.bool_)),
        "entropy": torch.from_numpy(entropy.astype(np.float32)),
    }


def _planes(values: np.ndarray) -> np.ndarray:
    """The lowest bytes of all values, then the next ones, uint8 [width, C]: equal bytes come to lie side by side."""
    return values.view(np.uint8).reshape(len(values), -1).T


def _values(planes: bytes, kind: str) -> np.ndarray:
    width = np.dtype(kind).itemsize
    return np.frombuffer(planes, np.uint8).reshape(width, -1).T.copy().view(kind).ravel()
