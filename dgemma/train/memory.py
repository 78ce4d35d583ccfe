"""Memory for time, and time for memory."""

import ctypes
import sys
from functools import partial
from typing import cast

from torch.utils.checkpoint import checkpoint

from dgemma.model.network import DiffusionGemma, Layer


def checkpoint_layers(model: DiffusionGemma) -> None:
    """Makes every layer of the network recompute its activations in the backward pass."""
    for layer in cast(list[Layer], list(model.layers)):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)  # type: ignore[method-assign]


def keep_freed_memory() -> None:
    """Lets glibc's malloc keep what is freed: faulting it in again takes a third of a step on a CPU."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        trim_threshold, top_pad, mmap_max = -1, -2, -4
        for name, value in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 100 << 20)):
            if mallopt:
                mallopt(name, value)
