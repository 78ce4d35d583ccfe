"""What `info` tells: from headers, quickly, and in agreement with the network and the release."""

import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dgemma.checkpoints.inspect import PARTS, count_parameters, inspect, part_of
from dgemma.checkpoints.names import stored_name
from dgemma.config import ModelConfig, VisionConfig
from dgemma.model.network import DiffusionGemma

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("shard", [5_000_000_000, 20_000])
def test_small_model(make_model, saved, shard):
    model = make_model(dtype=torch.bfloat16)
    directory = saved(model, max_shard_bytes=shard)
    info = inspect(directory)
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert info.tensors == len(model.state_dict())
    assert (info.bytes, info.bytes_by_dtype) == (size, {"BF16": size})
    assert list(info.shards) == sorted(path.name for path in directory.glob("*.safetensors"))
    assert sum(info.elements.values()) * 2 == size
    assert info.elements == count_parameters(model.config)


def test_dtypes_are_told_apart_and_twins_count_once(make_model, saved):
    model = make_model(vision=False)
    path = saved(model) / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.decoder.embed_tokens.weight"].bfloat16()
    save_file(tensors, path)
    info = inspect(path.parent)
    assert info.bytes_by_dtype["BF16"] == 2 * model.embed_tokens.weight.numel()
    assert info.elements == count_parameters(model.config)
    assert info.elements["vision"] == 0


def test_release(shared):
    config = ModelConfig.from_file(shared / "config.json")
    counted: Counter[str] = Counter()
    for line in (shared / "state_dict.txt").read_text().splitlines():
        name, shape, _ = line.split("\t")
        counted[part_of(name)] += math.prod(int(size) for size in shape.strip("()").split(",") if size)
    assert count_parameters(config) == counted
    billions = {part: round(count / 1e9, 2) for part, count in counted.items()}
    assert billions | {"vision": 0.57, "experts": 22.84, "attention": 1.11, "embedding": 0.74} == billions


@pytest.mark.parametrize("clipped", [True, False])
@pytest.mark.parametrize("standardize", [True, False])
def test_counts_follow_the_config(make_model, clipped, standardize):
    from dataclasses import replace

    config = make_model().config
    vision = config.vision.source | {"use_clipped_linears": clipped, "standardize": standardize}
    config = replace(config, vision=VisionConfig.from_dict(vision))
    with torch.device("meta"):
        state = DiffusionGemma(config).state_dict()
    counted = Counter(dict.fromkeys(PARTS, 0))
    for name, tensor in state.items():
        counted[part_of(stored_name(name))] += tensor.numel()
    assert count_parameters(config) == counted


def test_reads_headers_only_and_imports_no_torch(make_model, saved):
    directory = saved(make_model())
    code = f"""
import sys
from dgemma.checkpoints.inspect import inspect, count_parameters
from dgemma.checkpoints.source import resolve
from dgemma.config import ModelConfig
directory = resolve({str(directory)!r})
assert inspect(directory).elements == count_parameters(ModelConfig.from_file(directory / "config.json"))
print([name for name in ("torch", "numpy", "safetensors", "huggingface_hub") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


def test_damage_is_told(make_model, saved):
    path = saved(make_model()) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        inspect(path.parent)


def test_quantised_layouts_can_be_inspected(tmp_path):
    packed = {"model.decoder.layers.0.experts.0.up_proj.weight": torch.zeros(4, 8, dtype=torch.uint8)}
    save_file(packed, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "x"}}))
    info = inspect(tmp_path)
    assert info.bytes_by_dtype == {"U8": 32}
    assert info.elements["experts"] == 32
