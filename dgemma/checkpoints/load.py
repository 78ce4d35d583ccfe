"""The tensors of a model directory, or of a GGUF file, into the network."""

from collections import Counter
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dgemma.checkpoints.empty import empty_model
from dgemma.checkpoints.gguf_header import Gguf
from dgemma.checkpoints.headers import StoredTensor, listed, model_json, stored_tensors
from dgemma.checkpoints.layouts import read_layout
from dgemma.checkpoints.names import released_name, stored_name
from dgemma.checkpoints.pieces import Piece, assembled, check_complete, cut, encoded, is_plain, packed, pieces_of
from dgemma.checkpoints.reading import CODES, DTYPES, Reader
from dgemma.config import ModelConfig
from dgemma.model.network import DiffusionGemma
from dgemma.quant.ggml import Ggml
from dgemma.quant.modules import install
from dgemma.quant.packed import Packed
from dgemma.quant.quantize import Quantization


def load_model(
    directory: str | Path,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    quantize: str | Quantization | None = None,
) -> DiffusionGemma:
    """The network of a directory, in eval mode, all of it in one dtype but what is quantised.

    device: "auto" is cuda where there is one, else mps, else cpu. dtype: "auto" is what most of the file's floating
    bytes are in. What the file holds quantised stays so (`dgemma.quant`). quantize: what to quantise of a file that is
    not, one matrix at a time; "int8", "fp8", "int4", "w4a8", "nvfp4", or a Quantization.
    Tensors that need no change stay memory-mapped; others are read or converted one at a time, so that beside the
    result no more than one tensor is held. Raises OSError for missing files; ValueError for damaged ones and for
    tensors that are missing, unexpected, misshapen or not understood, by name.
    """
    directory = Path(directory)
    wish = Quantization(quantize) if isinstance(quantize, str) else quantize
    device = resolve_device(device)
    values = model_json(directory)
    layout = read_layout(directory, values)
    if wish and layout:
        raise ValueError(f"{directory} is quantised already: quantize={wish.format!r} has no effect")
    config = ModelConfig.from_dict(values)
    stored = stored_tensors(directory)
    dtype = resolve_dtype(stored, dtype)
    model = empty_model(config, dtype)
    state = model.state_dict()
    names = {stored_name(name): name for name in state}
    shapes = {name: tuple(state[own].shape) for name, own in names.items()}
    wanted = {name for name, own in names.items() if wish and wish.of(own)}
    pieces, unexpected = pieces_of(stored, shapes)
    whole = match_names(directory, stored, shapes, pieces, unexpected, vision=config.vision is not None)
    for target in wanted & whole.keys():
        pieces[target] = cut(target, whole.pop(target), stored)
    tensors = {names[name]: tensor for name, tensor in _read(whole, stored, device, dtype).items()}
    matrices: dict[str, Packed] = {}
    with Reader() as reader:
        for target in sorted(pieces, key=lambda target: _begin(pieces[target], stored)):
            own, shape, parts = names[target], shapes[target], pieces[target]
            try:
                check_complete(target, shape, parts)
                if not all(is_plain(piece, stored) for piece in parts):
                    matrices[own] = packed(shape, parts, stored, layout, dtype, reader).to(device)
                elif wish and target in wanted:
                    matrices[own] = encoded(own, shape, parts, stored, wish, dtype, reader).to(device)
                else:
                    tensors[own] = assembled(shape, parts, stored, dtype, reader).to(device)
            except ValueError as error:
                raise ValueError(f"{directory}: {error}") from None
    model.load_state_dict(tensors, assign=True, strict=False)
    install(model, matrices)
    return model.eval()


def _begin(pieces: list[Piece], stored: dict[str, StoredTensor]) -> tuple[Path, int]:
    first = stored[next(iter(pieces[0].parts.values()))]
    return first.file, first.begin


def load_gguf(gguf: Gguf, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto") -> DiffusionGemma:
    """The network of a GGUF file, in eval mode; quantised matrices stay so, and stay mapped on a CPU.

    dtype: "auto" is that of most plain matrices, else bfloat16.
    """
    device = resolve_device(device)
    dtype = _gguf_dtype(gguf, dtype)
    model = empty_model(gguf.config, dtype)
    tensors: dict[str, Tensor] = {}
    matrices: dict[str, Packed] = {}
    for name, tensor in gguf.tensors.items():
        data = torch.from_numpy(tensor.data)
        if tensor.type in DTYPES:
            tensors[name] = data.view(DTYPES[tensor.type]).to(device=device, dtype=dtype)
        else:
            matrices[name] = Ggml(tensor.shape, dtype, tensor.type, data).to(device)
    model.load_state_dict(tensors, assign=True, strict=False)
    install(model, matrices)
    return model.eval()


def _gguf_dtype(gguf: Gguf, dtype: str | torch.dtype) -> torch.dtype:
    if dtype != "auto":
        return _named_dtype(dtype)
    sizes: Counter[torch.dtype] = Counter()
    for tensor in gguf.tensors.values():
        if tensor.type in DTYPES and len(tensor.shape) > 1:
            sizes[DTYPES[tensor.type]] += tensor.data.nbytes
    return max(sizes, key=sizes.__getitem__, default=torch.bfloat16)


def resolve_device(device: str | torch.device) -> torch.device:
    """The device of a name such as "cuda:1"; "auto" is cuda where there is one, else Apple's mps, else cpu."""
    if device == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        device = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device {device!r} is not known; use 'auto', 'cpu', 'mps', 'cuda' or 'cuda:N'") from None
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device 'mps' is not there: this is no Mac with a GPU that torch can use")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device '{device}' is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def resolve_dtype(stored: dict[str, StoredTensor], dtype: str | torch.dtype) -> torch.dtype:
    """Of "auto", that of most of the floating bytes. ValueError for a dtype that is not known, stored or asked for."""
    sizes: Counter[str] = Counter()
    for name, tensor in stored.items():
        if tensor.dtype not in DTYPES and tensor.dtype not in CODES:
            told = ", ".join((*DTYPES, *CODES))
            raise ValueError(f"{tensor.file}: {name} is stored as {tensor.dtype}; known are {told}")
        if tensor.dtype in DTYPES and "_scale" not in name:
            sizes[tensor.dtype] += tensor.bytes
    return DTYPES[max(sizes, key=sizes.__getitem__, default="BF16")] if dtype == "auto" else _named_dtype(dtype)


def _named_dtype(dtype: str | torch.dtype) -> torch.dtype:
    known = {str(known).removeprefix("torch."): known for known in DTYPES.values()}
    wanted = known.get(str(dtype).removeprefix("torch."))
    if wanted is None:
        raise ValueError(f"dtype {str(dtype)!r} is not one of auto, {', '.join(known)}")
    return wanted


def match_names(
    directory: Path,
    stored: dict[str, StoredTensor],
    shapes: dict[str, tuple[int, ...]],
    pieces: dict[str, list[Piece]],
    unexpected: list[str],
    vision: bool,
) -> dict[str, str]:
    """Of the network's released names those stored whole, with the stored name to read. Any mismatch is a ValueError.

    pieces, unexpected: what `pieces_of` makes of the rest.
    """
    chosen: dict[str, str] = {}
    misshapen = []
    for name, tensor in stored.items():
        released = released_name(name)
        if tensor.dtype not in DTYPES or released not in shapes:
            continue
        if released == name or released not in chosen:
            chosen[released] = name
        if tensor.shape != shapes[released]:
            misshapen.append(f"{name}: {list(tensor.shape)}, not {list(shapes[released])}")
    missing = [name for name in shapes if name not in chosen and name not in pieces]
    twice = [name for name in pieces if name in chosen]
    problems = [
        f"{what} {listed(found, 'tensor')}"
        for what, found in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("wrongly shaped", misshapen),
            ("stored both plain and quantised", twice),
        )
        if found
    ]
    if not vision and any("vision" in name for name in unexpected):
        problems.append("config.json has no vision_config")
    if problems:
        raise ValueError(f"{directory} does not fit its config.json: {'; '.join(problems)}")
    return chosen


def _read(
    chosen: dict[str, str], stored: dict[str, StoredTensor], device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Tensors by released name, read in the order of the files."""
    handles: dict[Path, safe_open] = {}
    tensors = {}
    for released, name in sorted(chosen.items(), key=lambda pair: (stored[pair[1]].file, stored[pair[1]].begin)):
        entry = stored[name]
        mapped = device.type == "cpu" and DTYPES[entry.dtype] == dtype
        try:
            # What is read through a handle stays resident until it is dropped: only tensors left mapped share one.
            handle = handles.get(entry.file) or safe_open(entry.file, framework="pt")
            tensors[released] = handle.get_tensor(name).to(device=device, dtype=dtype)
        except SafetensorError as error:
            raise ValueError(f"{entry.file} is damaged: {error}; download it again") from None
        if mapped:
            handles[entry.file] = handle
    return tensors
