"""GGUF files of DiffusionGemma, as llama.cpp's converter writes them: tensors that fit the network."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from dgemma.checkpoints.empty import empty_model
from dgemma.checkpoints.gguf_header import ROPE, Gguf, read_gguf_header, stored_name
from dgemma.checkpoints.headers import listed
from dgemma.model.layers import inverse_frequencies

UNTURNED = 1e30
"""In rope_freqs.weight, which divides frequencies: a pair that does not turn."""


def read_gguf(path: str | Path) -> Gguf:
    """Reads a GGUF file; of a split one, any part, with the others beside it. Tensors stay on disk.

    Raises what `read_gguf_header` and `fitted` raise.
    """
    return fitted(Path(path), read_gguf_header(path))


def fitted(path: Path, header: Gguf) -> Gguf:
    """The same with the tensors by their names in the network.

    ValueError for those that are missing, unexpected or misshapen, by stored name, and for other scaled positions.
    """
    _check_rope(path, header)
    stored = header.tensors
    state = empty_model(header.config, torch.bfloat16).state_dict()
    names = {name: stored_name(name) for name in state}
    missing = [name for name in names.values() if name not in stored]
    unexpected = sorted(stored.keys() - names.values() - {ROPE})
    misshapen = [
        f"{name}: {list(stored[name].shape)}, not {list(state[own].shape)}"
        for own, name in names.items()
        if name in stored and stored[name].shape != tuple(state[own].shape)
    ]
    problems = [
        f"{what} {listed(found, 'tensor')}"
        for what, found in (("missing", missing), ("unexpected", unexpected), ("wrongly shaped", misshapen))
        if found
    ]
    if problems:
        raise ValueError(f"{path} does not fit its own keys: {'; '.join(problems)}")
    return replace(header, tensors={own: stored[name] for own, name in names.items()})


def _check_rope(path: Path, header: Gguf) -> None:
    config, factors = header.config, header.tensors[ROPE].data
    turning = inverse_frequencies(config.rope_full, config.global_head_dim, torch.device("cpu")).numpy() > 0
    if not np.array_equal(factors, np.where(turning, 1, np.float32(UNTURNED))):
        raise ValueError(
            f"{path}: {ROPE} {list(factors.shape)} is not 1 for the first pairs and {UNTURNED:g} for the rest of "
            f"{config.global_head_dim // 2}: other scaled positions are not supported"
        )
