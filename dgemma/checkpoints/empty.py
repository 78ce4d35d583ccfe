"""The network before it has weights."""

from dataclasses import replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from dgemma.config import ModelConfig
from dgemma.model.network import DiffusionGemma


class _NoInit(TorchFunctionMode):
    """Skips torch.nn.init: filling a tensor without storage does nothing, but imports a second's worth of modules."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


def empty_model(config: ModelConfig, dtype: torch.dtype) -> DiffusionGemma:
    """The network without weights, on the meta device."""
    with torch.device("meta"), _NoInit():
        return DiffusionGemma(replace(config, dtype=str(dtype).removeprefix("torch.")))
