"""The network at full size, on the meta device: exactly the released tensors."""

import torch

from dgemma.checkpoints.names import released_name, stored_name
from dgemma.config import ModelConfig
from dgemma.model.network import DiffusionGemma


def test_names_shapes_and_kinds_are_the_released_ones(shared):
    config = ModelConfig.from_file(shared / "config.json")
    with torch.device("meta"):
        model = DiffusionGemma(config)
    buffers = {name for name, _ in model.named_buffers()}
    ours = {
        stored_name(name): (tuple(tensor.shape), "buffer" if name in buffers else "param")
        for name, tensor in model.state_dict().items()
    }
    lines = (shared / "state_dict.txt").read_text().splitlines()
    stored = {}
    for line in lines:
        name, shape, kind = line.split("\t")
        stored[name] = (tuple(int(n) for n in shape.strip("(),").split(",") if n.strip()), kind)
    assert len(stored) == len(lines) == 1047
    assert ours.keys() == stored.keys()
    assert {n: shape for n, (shape, _) in ours.items()} == {n: shape for n, (shape, _) in stored.items()}
    kinds = {kind for _, kind in stored.values()}
    assert len(kinds) == 2
    scalars = [n for n, (_, kind) in stored.items() if kind == "buffer"]
    assert all(ours[name][1] == "buffer" for name in scalars)
    assert sum(kind == "buffer" for _, kind in ours.values()) == len(scalars)
    assert all(released_name(name) == name for name in stored)
