"""Time for memory."""

from functools import partial
from typing import cast

from torch.utils.checkpoint import checkpoint

from dgemma.model.network import DiffusionGemma, Layer


def checkpoint_layers(model: DiffusionGemma) -> None:
    """Makes every layer of the network recompute its activations in the backward pass."""
    for layer in cast(list[Layer], list(model.layers)):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)  # type: ignore[method-assign]
