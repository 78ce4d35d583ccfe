"""Saving: what is written, that it is whole or not there, and that transformers reads it and is read."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dgemma.checkpoints.load import load_model
from dgemma.checkpoints.save import save_model
from dgemma.config import GenerationConfig, ModelConfig
from dgemma.model.lora import Lora, add_lora

ROOT = Path(__file__).resolve().parents[2]


def listing(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_and_their_content(make_model, saved, dtype):
    model = make_model(dtype=dtype)
    directory = saved(model)
    assert listing(directory) == ["config.json", "generation_config.json", "model.safetensors"]
    values = json.loads((directory / "config.json").read_text())
    name = str(dtype).removeprefix("torch.")
    assert {values["dtype"], values["text_config"]["dtype"], values["vision_config"]["dtype"]} == {name}
    assert ModelConfig.from_file(directory / "config.json").vision == model.config.vision
    with safe_open(directory / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert {file.get_tensor(key).dtype for key in file.keys()} == {dtype}  # noqa: SIM118


def test_weights_may_be_read_by_whoever_may_read_the_config(make_model, saved):
    directory = saved(make_model())
    assert (directory / "model.safetensors").stat().st_mode == (directory / "config.json").stat().st_mode


def test_names_are_the_released_ones(make_model, saved, shared):
    import re

    def pattern(names):
        return {re.sub(r"layers\.\d+\.", "layers.N.", name) for name in names}

    released = [line.split()[0] for line in (shared / "state_dict.txt").read_text().splitlines() if line.strip()]
    assert pattern(load_file(saved(make_model()) / "model.safetensors")) == pattern(released)


def test_generation_config(make_model, tmp_path):
    wanted = GenerationConfig(max_denoising_steps=7, entropy_bound=0.3, eos_token_id=(1, 5))
    save_model(make_model(), tmp_path, wanted)
    assert GenerationConfig.from_file(tmp_path / "generation_config.json") == wanted


def test_shards_stay_below_their_size_and_are_indexed(make_model, saved):
    model = make_model()
    directory = saved(model, max_shard_bytes=20_000)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    shards = sorted(directory.glob("*.safetensors"))
    held = {path.name: load_file(path) for path in shards}
    assert len(shards) > 2
    assert [path.name for path in shards] == [
        f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))
    ]
    assert index["weight_map"] == {name: file for file, tensors in held.items() for name in tensors}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in model.state_dict().values())
    assert all(len(t) == 1 or sum(x.nbytes for x in t.values()) <= 20_000 for t in held.values())


def test_extras_are_copied_where_they_exist(make_model, saved, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "README.md"):
        (source / name).write_text(f"this is {name}")
    directory = saved(make_model(), extras=[source])
    assert (directory / "tokenizer.json").read_text() == "this is tokenizer.json"
    assert (directory / "chat_template.jinja").exists()
    assert not (directory / "README.md").exists()
    assert not (directory / "tokenizer_config.json").exists()


def test_each_extra_comes_from_the_first_folder_that_has_it(make_model, saved, tmp_path):
    own, base = tmp_path / "own", tmp_path / "base"
    for folder, names in ((own, ["chat_template.jinja"]), (base, ["chat_template.jinja", "tokenizer.json"])):
        folder.mkdir()
        for name in names:
            (folder / name).write_text(folder.name)
    directory = saved(make_model(), extras=[own, base])
    assert (directory / "chat_template.jinja").read_text() == "own"
    assert (directory / "tokenizer.json").read_text() == "base"


def test_an_adapter_that_is_not_merged_is_no_model_of_the_released_format(make_model, tmp_path):
    model = make_model()
    add_lora(model, Lora(rank=2))
    with pytest.raises(ValueError, match=r"layers\.0\..* is an adapter that is not merged"):
        save_model(model, tmp_path / "out", GenerationConfig())
    assert not (tmp_path / "out").exists()


def test_saving_again_with_other_shards_leaves_no_old_weights(make_model, saved):
    model = make_model()
    saved(model, max_shard_bytes=20_000)
    directory = saved(model)
    assert listing(directory) == ["config.json", "generation_config.json", "model.safetensors"]
    saved(model, max_shard_bytes=20_000)
    assert "model.safetensors" not in listing(directory)
    assert "model.safetensors.index.json" in listing(directory)
    assert load_model(directory, "cpu").state_dict().keys() == model.state_dict().keys()


def test_saving_over_the_files_a_model_is_mapped_from(make_model, saved):
    model = make_model()
    directory = saved(model)
    loaded = load_model(directory, "cpu")
    with torch.no_grad():
        loaded.norm.weight.add_(1)
    saved(loaded, extras=[directory])
    again = load_model(directory, "cpu")
    assert torch.equal(again.norm.weight, model.norm.weight + 1)
    assert torch.equal(again.embed_tokens.weight, loaded.embed_tokens.weight)


def test_a_failed_save_is_one_line_and_leaves_what_was_there(make_model, saved):
    """The file size limit stands in for a full disk."""
    directory = saved(make_model())
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    code = f"""
import resource, signal, sys
from dgemma.checkpoints.load import load_model
from dgemma.checkpoints.save import save_model
from dgemma.config import GenerationConfig
model = load_model({str(directory)!r}, "cpu", "bfloat16")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
try:
    save_model(model, {str(directory)!r}, GenerationConfig(max_new_tokens=9))
except OSError as error:
    print(error)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"cannot write {directory}")
    assert done.stdout.count("\n") == 1
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
