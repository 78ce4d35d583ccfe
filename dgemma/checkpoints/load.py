"""A model directory's tensors into the network."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dgemma.checkpoints.headers import StoredTensor, listed, model_json, stored_tensors
from dgemma.checkpoints.names import released_name, stored_name
from dgemma.config import ModelConfig
from dgemma.model.network import DiffusionGemma

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


class _NoInit(TorchFunctionMode):
    """Skips torch.nn.init: filling a tensor without storage does nothing, but imports a second's worth of modules."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


def load_model(
    directory: str | Path, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto"
) -> DiffusionGemma:
    """The network of a directory, in eval mode, all of it in one dtype.

    device: "auto" is cuda where there is one, else cpu. dtype: "auto" is what most of the file's bytes are in.
    Tensors that need no change stay memory-mapped; others are converted one at a time, so that beside the result no
    more than one tensor is held. Raises OSError for missing files; ValueError for damaged ones and for tensors that are
    missing, unexpected, misshapen or not understood, by name.
    """
    directory = Path(directory)
    values = model_json(directory)
    _refuse_quantised(directory, values)
    config = ModelConfig.from_dict(values)
    stored = stored_tensors(directory)
    device = resolve_device(device)
    dtype = _resolve_dtype(stored, dtype)
    with torch.device("meta"), _NoInit():
        model = DiffusionGemma(replace(config, dtype=str(dtype).removeprefix("torch.")))
    state = model.state_dict()
    names = {stored_name(name): name for name in state}
    shapes = {name: tuple(state[own].shape) for name, own in names.items()}
    chosen = _match(directory, stored, shapes, vision=config.vision is not None)
    tensors = {names[name]: tensor for name, tensor in _read(chosen, stored, device, dtype).items()}
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def resolve_device(device: str | torch.device) -> torch.device:
    """The device of a name such as "cuda:1"; "auto" is cuda where there is one, else cpu."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device {device!r} is not known; use 'auto', 'cpu', 'cuda' or 'cuda:N'") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device '{device}' is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def _resolve_dtype(stored: dict[str, StoredTensor], dtype: str | torch.dtype) -> torch.dtype:
    sizes: Counter[str] = Counter()
    for name, tensor in stored.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{tensor.file}: {name} is stored as {tensor.dtype}; known are {', '.join(DTYPES)}")
        sizes[tensor.dtype] += tensor.bytes
    if dtype == "auto":
        return DTYPES[max(sizes, key=sizes.__getitem__, default="BF16")]
    known = {str(known).removeprefix("torch."): known for known in DTYPES.values()}
    wanted = known.get(str(dtype).removeprefix("torch."))
    if wanted is None:
        raise ValueError(f"dtype {str(dtype)!r} is not one of auto, {', '.join(known)}")
    return wanted


def _refuse_quantised(directory: Path, values: dict) -> None:
    quantised = values.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method", "unnamed") if isinstance(quantised, dict) else quantised
        raise ValueError(f"{directory} is quantised ({method}), which cannot be loaded yet; use the bfloat16 release")


def _match(
    directory: Path, stored: dict[str, StoredTensor], shapes: dict[str, tuple[int, ...]], vision: bool
) -> dict[str, str]:
    """The network's released names, each with the stored name to read it from. Any mismatch is a ValueError."""
    chosen: dict[str, str] = {}
    for name in stored:
        released = released_name(name)
        if released == name or released not in chosen:
            chosen[released] = name
    missing = [name for name in shapes if name not in chosen]
    unexpected = [name for name in stored if released_name(name) not in shapes]
    misshapen = [
        f"{name}: {list(tensor.shape)}, not {list(shape)}"
        for name, tensor in stored.items()
        if (shape := shapes.get(released_name(name))) is not None and shape != tensor.shape
    ]
    problems = [
        f"{what} {listed(found, 'tensor')}"
        for what, found in (("missing", missing), ("unexpected", unexpected), ("wrongly shaped", misshapen))
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
