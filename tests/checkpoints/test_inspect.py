"""What `info` tells: from headers, quickly, and in agreement with the network and the release."""

import json
import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dgemma.checkpoints.inspect import (
    GROUP_BYTES,
    GROUP_ROWS,
    PARTS,
    SCORES_LIMIT,
    attention_bytes,
    conversation_bytes,
    count_parameters,
    formats_of,
    inspect,
    large_matrices,
    part_of,
    vocabulary_bytes,
    weight_bytes,
)
from dgemma.checkpoints.load import load_model
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
    assert info.bytes_by_part == {part: 2 * count for part, count in info.elements.items()}


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
    assert sum(info.bytes_by_part.values()) == 4 * sum(info.elements.values())


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
    assert info.elements["experts"] == info.bytes_by_part["experts"] == 32


@pytest.mark.parametrize(
    ("format", "parts", "published"),
    [
        ("BF16", (), 51.6),
        ("FP8", ("attention", "dense MLP", "experts"), 27.2),
        ("NVFP4", ("experts",), 18.8),
        ("INT4", ("attention", "experts"), 17.2),
    ],
)
def test_memory_is_that_of_published_files(shared, format, parts, published):
    config = ModelConfig.from_file(shared / "config.json")
    assert weight_bytes(config, format, parts) / 1e9 == pytest.approx(published, rel=0.03)


@pytest.mark.parametrize("format", ["FP8", "INT4", "NVFP4"])
def test_memory_is_what_quantised_weights_take(make_model, saved, format):
    config = replace(make_model().config, hidden_size=64, intermediate_size=96, moe_intermediate_size=32)
    directory = saved(DiffusionGemma(config).init_weights().bfloat16())
    assert formats_of(config) == ["BF16", "FP8", "INT4", "NVFP4"]
    model = load_model(directory, "cpu", quantize=format.lower())
    assert weight_bytes(config, format) == sum(tensor.nbytes for tensor in model.state_dict().values())


def test_formats_are_those_whose_groups_fit(make_model):
    config = make_model().config
    assert {columns for shapes in large_matrices(config).values() for _, columns in shapes} == {16, 32, 48, 64, 128}
    assert formats_of(config) == ["BF16", "FP8", "NVFP4"]


def test_activations_are_those_of_the_network():
    from dgemma.decoding import vocabulary
    from dgemma.model import attention

    assert (GROUP_BYTES, GROUP_ROWS) == (vocabulary.GROUP_BYTES, vocabulary.GROUP_ROWS)
    assert SCORES_LIMIT == attention.SCORES_LIMIT


def test_a_conversation_of_the_release(shared):
    config = ModelConfig.from_file(shared / "config.json")
    assert vocabulary_bytes(config) == 128 * 262_144 * 2
    # Two heads of keys and values, 512 wide, in bfloat16; scores, masked or not, and their softmax.
    assert attention_bytes(config, 8192) == 8192 * 2 * 2 * 512 * 2 + 3 * 256 * 16 * 8192 * 2
    assert attention_bytes(config, 262_144) == 262_144 * 2 * 2 * 512 * 2 + 3 * 2 * (1 << 26)
    held = 2 * config.cache_bytes(8192) + vocabulary_bytes(config) + attention_bytes(config, 8192)
    assert conversation_bytes(config, 8192) == held


def test_the_gathered_copy_is_no_larger_than_the_pages(make_model):
    model = make_model(vision=False, dtype=torch.bfloat16)
    cache = model.new_cache()
    with torch.inference_mode():
        model.encode(torch.ones(1, 50, dtype=torch.int64), cache)
        model.denoise(torch.ones(1, 8, dtype=torch.int64), cache)
    copies = sum(keys.nbytes + values.nbytes for _, (keys, values) in cache._gathered.values())
    assert 0 < copies <= cache.nbytes == model.config.cache_bytes(50)


def test_bytes_of_parts_have_their_scales(make_model, saved):
    directory = saved(make_model(dtype=torch.bfloat16))
    info = inspect(saved(load_model(directory, "cpu", quantize="fp8"), "quantised"))
    parameters = count_parameters(make_model().config)
    rows = sum(rows for rows, _ in large_matrices(make_model().config)["experts"])
    assert info.bytes_by_part["experts"] == parameters["experts"] + 2 * rows
    assert info.bytes_by_part["embedding"] == 2 * parameters["embedding"]
