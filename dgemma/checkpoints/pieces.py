"""Matrices out of what a file holds of them: the parts of a quantised one, experts one by one, or both."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dgemma.checkpoints.headers import StoredTensor, listed
from dgemma.checkpoints.layouts import UNUSED, Layout, Scheme
from dgemma.checkpoints.names import released_name
from dgemma.checkpoints.reading import CODES, DTYPES, Reader, slices
from dgemma.quant.formats import FORMATS, W4A8
from dgemma.quant.packed import Packed
from dgemma.quant.quantize import Quantization

PARTS = UNUSED | {
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_scale_2",
    "weight_global_scale",
    "weight_shape",
    "weight_zero_point",
    "weight_g_idx",
}
_KV = re.compile(r".*\.self_attn\.[kv]_scale")
"""Of keys and values in eight bits, which ours are not."""
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj")


@dataclass(frozen=True)
class Piece:
    """A stored matrix: all of a target, or the rows `first` to `last` of one of its stack.

    target and module: released names; parts: stored names by part.
    """

    target: str
    module: str
    expert: int | None
    first: int
    last: int
    parts: dict[str, str]

    @property
    def index(self) -> Any:
        """Of its rows in the whole target."""
        return ... if self.expert is None else (self.expert, slice(self.first, self.last))


def pieces_of(
    stored: Mapping[str, StoredTensor], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, list[Piece]], list[str]]:
    """What is stored in pieces, by target, and the names that belong to nothing.

    shapes: of the network's tensors by released name. One of these in a floating dtype is not a piece.
    """
    found: dict[str, Piece] = {}
    unexpected = []
    for name, entry in stored.items():
        released = released_name(name)
        if released in shapes and entry.dtype in DTYPES:
            continue
        module, _, part = released.rpartition(".")
        place = _place(module, shapes) if part in PARTS else None
        if place is None and not _KV.fullmatch(released):
            unexpected.append(name)
        elif place and part not in UNUSED:
            target, expert, first, last = place
            piece = found.setdefault(module, Piece(target, module, expert, first, last, {}))
            if name == released or part not in piece.parts:  # other tools also write the twins of tied tensors
                piece.parts[part] = name
    targets: dict[str, list[Piece]] = {}
    for piece in found.values():
        targets.setdefault(piece.target, []).append(piece)
    return targets, unexpected


def _place(module: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, int | None, int, int] | None:
    if expert := _EXPERT.fullmatch(module):
        stack, number, which = expert[1], int(expert[2]), expert[3]
        target = f"{stack}.{'down_proj' if which == 'down' else 'gate_up_proj'}"
        count, rows = shapes.get(target, (0, 0))[:2]
        first, last = {"gate": (0, rows // 2), "up": (rows // 2, rows), "down": (0, rows)}[which]
        return (target, number, first, last) if number < count else None
    whole = next((name for name in (f"{module}.weight", module) if len(shapes.get(name, ())) > 1), None)
    return None if whole is None else (whole, None, 0, shapes[whole][-2])


def check_complete(target: str, shape: tuple[int, ...], pieces: Iterable[Piece]) -> None:
    """ValueError unless the pieces are the whole target, once."""
    rows = dict.fromkeys(range(shape[0]), 0) if len(shape) == 3 else {}
    whole = 0
    for piece in pieces:
        if piece.expert is None:
            whole += 1
        else:
            rows[piece.expert] += piece.last - piece.first
    if whole > 1 or (whole and any(rows.values())):
        raise ValueError(f"{target} is stored both whole and in pieces")
    lacking = [str(expert) for expert, count in rows.items() if count != shape[1]]
    if lacking and not whole:
        raise ValueError(f"{target} is not whole: rows are missing of {listed(lacking, 'expert')}")


def is_plain(piece: Piece, stored: Mapping[str, StoredTensor]) -> bool:
    return piece.parts.keys() == {"weight"} and stored[piece.parts["weight"]].dtype in DTYPES


def cut(target: str, name: str, stored: dict[str, StoredTensor]) -> list[Piece]:
    """A plain tensor as pieces: a stack matrix by matrix, which get entries of their own."""
    entry = stored[name]
    if len(entry.shape) == 2:
        return [Piece(target, target, None, 0, entry.shape[0], {"weight": name})]
    parts = {f"{name}[{expert}]": part for expert, part in enumerate(slices(entry))}
    stored.update(parts)
    return [Piece(target, target, e, 0, entry.shape[1], {"weight": part}) for e, part in enumerate(parts)]


def _plain(piece: Piece, shape: tuple[int, ...], stored: Mapping[str, StoredTensor], reader: Reader) -> Tensor:
    name = piece.parts["weight"]
    wanted = (piece.last - piece.first, shape[-1])
    if stored[name].shape != wanted:
        raise ValueError(f"{name} has shape {list(stored[name].shape)}; {list(wanted)} is expected")
    return reader.tensor(stored[name])


def assembled(
    shape: tuple[int, ...],
    pieces: list[Piece],
    stored: Mapping[str, StoredTensor],
    dtype: torch.dtype,
    reader: Reader,
) -> Tensor:
    """A stack of experts that are stored one by one."""
    whole = torch.empty(shape, dtype=dtype)
    for piece in pieces:
        whole[piece.index] = _plain(piece, shape, stored, reader)
    return whole


def encoded(
    name: str,
    shape: tuple[int, ...],
    pieces: list[Piece],
    stored: Mapping[str, StoredTensor],
    wish: Quantization,
    dtype: torch.dtype,
    reader: Reader,
) -> Packed:
    """A matrix or stack quantised as wished, piece by piece; name: the network's own."""
    dense = ((piece.index, _plain(piece, shape, stored, reader)) for piece in pieces)
    return wish.pack(name, shape, dtype, dense)


def packed(
    shape: tuple[int, ...],
    pieces: list[Piece],
    stored: Mapping[str, StoredTensor],
    layout: Layout | None,
    dtype: torch.dtype,
    reader: Reader,
) -> Packed:
    """A quantised matrix as its pieces hold it. ValueError names the tensor that is not as its layout says."""
    scheme = _scheme(pieces, layout)
    if shape[-1] % max(8, scheme.group):
        raise ValueError(f"{pieces[0].module} has {shape[-1]} columns, which do not make groups of {scheme.group or 8}")
    buffers: dict[str, Tensor] = {}
    for piece in pieces:
        _check_parts(piece, scheme)
        _check_shape(piece, scheme, shape, stored, reader)
        for name, part in ((piece.parts[name], part) for name, part in scheme.parts.items()):
            entry = stored[name]
            if entry.dtype not in part.dtypes:
                raise ValueError(
                    f"{name} is stored as {entry.dtype}; its layout has {' or '.join(sorted(part.dtypes))}"
                )
            memory = DTYPES.get(entry.dtype) or CODES[entry.dtype]
            if part.buffer not in buffers:
                columns = _columns(scheme, part.buffer, shape[-1])
                buffers[part.buffer] = torch.empty(*shape[:-1], columns, dtype=memory)
            if buffers[part.buffer].dtype != memory:
                raise ValueError(f"{name} is stored as {entry.dtype}, others of its stack otherwise")
            _fill(buffers[part.buffer][piece.index], name, entry, reader)
    if scheme.kind == "int4":
        buffers["codes"] = buffers["codes"].view(torch.uint8)
        # Products in int8 need scales of one kind, as `dgemma quantize` makes them; others keep x as it is.
        if scheme.activations and scheme.group % 16 == 0 and (parts := W4A8.of_int4(**buffers)):
            return W4A8(shape, dtype, **parts)
    options: Any = {"divide": scheme.divide} if scheme.kind == "nvfp4" else {}
    if scheme.kind == "int8":
        options = {"activations": scheme.activations}
    return FORMATS[scheme.kind](shape, dtype, **(options | buffers))


def _fill(rows: Tensor, name: str, entry: StoredTensor, reader: Reader) -> None:
    """Rows of a buffer; a single column may be stored as one number for a whole matrix."""
    shape = tuple(rows.shape)
    if entry.shape in (shape, shape[:-1] if shape[-1] == 1 else shape):
        reader.into(entry, rows)
    elif shape[-1] == 1 and entry.shape in ((), (1,), shape[:-2], (*shape[:-2], 1)):
        rows.copy_(reader.tensor(entry).view(*shape[:-2], 1, 1))
    else:
        raise ValueError(f"{name} has shape {list(entry.shape)}; {list(shape)} is expected")


def _scheme(pieces: list[Piece], layout: Layout | None) -> Scheme:
    first = next(iter(pieces[0].parts.values()))
    if layout is None:
        raise ValueError(f"{first} is stored quantised, but config.json has no quantization_config")
    scheme = layout.scheme(pieces[0].module)
    other = next((piece for piece in pieces if layout.scheme(piece.module) != scheme), None)
    if other:
        raise ValueError(f"{pieces[0].module} and {other.module} are of one stack, but of different config_groups")
    return scheme


def _check_parts(piece: Piece, scheme: Scheme) -> None:
    for part, what in (("weight_zero_point", "zero points"), ("weight_g_idx", "reordered columns")):
        if part in piece.parts:
            raise ValueError(f"{piece.parts[part]}: weights with {what} are not supported")
    lacking = [part for part in scheme.parts if part not in piece.parts]
    extra = [name for part, name in piece.parts.items() if part not in scheme.parts and part != scheme.shape_part]
    if lacking or extra:
        told = [f"lacks {', '.join(lacking)}"] if lacking else []
        told += [f"has {', '.join(extra)} besides"] if extra else []
        raise ValueError(f"{piece.module} is not stored as its layout ({scheme.kind}) says: it {' and '.join(told)}")


def _check_shape(
    piece: Piece, scheme: Scheme, shape: tuple[int, ...], stored: Mapping[str, StoredTensor], reader: Reader
) -> None:
    """weight_shape, where there is one, must tell the matrix's own."""
    if scheme.shape_part not in piece.parts:
        return
    name = piece.parts[scheme.shape_part]
    told = reader.tensor(stored[name]).flatten().tolist() if stored[name].dtype in ("I64", "I32") else None
    wanted = [piece.last - piece.first, shape[-1]]
    if told is None or told[-2:] != wanted:
        raise ValueError(f"{name} tells {told}; the config makes it {wanted}")


def _columns(scheme: Scheme, buffer: str, columns: int) -> int:
    """The last axis of a buffer, in elements of its stored dtype."""
    match scheme.kind, buffer:
        case _, "factor":
            return 1
        case _, "scale":
            return columns // scheme.group if scheme.group else 1
        case "int4", _:
            return columns // 8  # to an int32
        case "nvfp4", _:
            return columns // 2
    return columns
