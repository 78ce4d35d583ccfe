"""Loading: equal weights whatever the layout, and an error that names what is wrong."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dgemma.checkpoints.load import load_model, resolve_device
from dgemma.checkpoints.names import released_name

DECODER, TWIN = "model.decoder.", "model.encoder.language_model."
EMBEDDING, NORM = "model.decoder.embed_tokens.weight", "model.decoder.norm.weight"


@pytest.fixture
def rewrite():
    """Changes the tensors of a directory's single file: a function from the dict of them to another."""

    def apply(directory, change):
        tensors = load_file(directory / "model.safetensors")
        save_file(change(tensors), directory / "model.safetensors", metadata={"format": "pt"})

    return apply


@pytest.mark.parametrize("vision", [True, False])
@pytest.mark.parametrize("shard", [5_000_000_000, 20_000])
def test_round_trip(make_model, saved, vision, shard):
    model = make_model(vision)
    directory = saved(model, max_shard_bytes=shard)
    assert (directory / "model.safetensors").exists() == (shard > 20_000)
    loaded = load_model(directory, "cpu")
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not loaded.training


def test_golden_logits_of_the_small_release(shared):
    model = load_model(shared / "small", "cpu", "float32")
    golden = load_file(shared / "small" / "golden.safetensors")
    with torch.no_grad():
        cache = model.new_cache()
        model.encode(golden["tokens"], cache)
        first = model.denoise(golden["canvas"], cache)
        conditioned = model.denoise(golden["canvas"], cache, golden["previous_logits"])
    torch.testing.assert_close(first, golden["logits_first"], atol=1e-4, rtol=0)
    torch.testing.assert_close(conditioned, golden["logits_conditioned"], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("stored", "wanted", "expected"),
    [
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.float16, "auto", torch.float16),
        (torch.bfloat16, "float32", torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16),
    ],
)
def test_dtypes(make_model, saved, edit_json, stored, wanted, expected):
    model = make_model(dtype=stored)
    directory = saved(model)
    edit_json(directory / "config.json", dtype="float32")  # "auto" goes by the tensors
    loaded = load_model(directory, "cpu", wanted)
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {expected}
    assert loaded.config.dtype == str(expected).removeprefix("torch.")
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.to(expected))


def test_mixed_dtypes_become_the_one_of_most_bytes(make_model, saved, rewrite):
    directory = saved(make_model(dtype=torch.bfloat16))
    rewrite(directory, lambda tensors: tensors | {NORM: tensors[NORM].float()})
    assert {tensor.dtype for tensor in load_model(directory, "cpu").state_dict().values()} == {torch.bfloat16}


@pytest.mark.parametrize("keep", ["decoder", "encoder", "both"])
def test_twins(make_model, saved, rewrite, keep):
    model = make_model()
    directory = saved(model)

    def twins(tensors):
        tied = {name for name in tensors if name.startswith(DECODER) and "layer_scalar" not in name}
        # Where both are there the decoder's must win: wrong twins show it.
        wrong = 1.0 if keep == "both" else 0.0
        encoder = {name.replace(DECODER, TWIN): tensors[name] + wrong for name in tied}
        kept = {name: tensor for name, tensor in tensors.items() if keep != "encoder" or name not in tied}
        return kept | (encoder if keep != "decoder" else {})

    rewrite(directory, twins)
    loaded = load_model(directory, "cpu").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("alone", [True, False])
def test_head_twin(make_model, saved, rewrite, alone):
    model = make_model()
    directory = saved(model)

    def head(tensors):
        embedding = tensors.pop(EMBEDDING) if alone else tensors[EMBEDDING] + 1
        return tensors | {"lm_head.weight": embedding}

    rewrite(directory, head)
    assert torch.equal(load_model(directory, "cpu").embed_tokens.weight, model.embed_tokens.weight)


def test_scalars_of_the_two_modes_are_no_twins():
    scalar = "model.encoder.language_model.layers.3.layer_scalar"
    assert released_name(scalar) == scalar
    assert (
        released_name(scalar.replace("layer_scalar", "mlp.up_proj.weight"))
        == "model.decoder.layers.3.mlp.up_proj.weight"
    )


def test_missing_and_unexpected_tensors_are_named(make_model, saved, rewrite):
    directory = saved(make_model())

    def change(tensors):
        del tensors[NORM]
        return tensors | {"model.decoder.extra.weight": torch.ones(2)}

    rewrite(directory, change)
    with pytest.raises(
        ValueError, match=r"missing 1 tensor \(model.decoder.norm.weight\); unexpected 1 tensor \(model.d"
    ):
        load_model(directory, "cpu")


def test_many_missing_tensors_are_counted(make_model, saved, rewrite):
    directory = saved(make_model())
    rewrite(directory, lambda tensors: {name: t for name, t in tensors.items() if ".layers.1." not in name})
    with pytest.raises(ValueError, match=r"missing \d\d tensors \(model\..*layers\.1\.\S+, .* and \d+ more\)") as error:
        load_model(directory, "cpu")
    assert "\n" not in str(error.value)


def test_a_missing_encoder_scalar_is_missing(make_model, saved, rewrite):
    directory = saved(make_model())
    rewrite(directory, lambda tensors: {n: t for n, t in tensors.items() if n != f"{TWIN}layers.0.layer_scalar"})
    with pytest.raises(ValueError, match=r"missing 1 tensor \(model.encoder.language_model.layers.0.layer_scalar\)"):
        load_model(directory, "cpu")


@pytest.mark.parametrize("name", [NORM, "model.encoder.language_model.norm.weight"])
def test_wrong_shapes_are_named_even_of_unused_twins(make_model, saved, rewrite, name):
    directory = saved(make_model())
    rewrite(directory, lambda tensors: tensors | {name: torch.ones(31)})
    with pytest.raises(ValueError, match=rf"wrongly shaped 1 tensor \({name}: \[31\], not \[32\]\)"):
        load_model(directory, "cpu")


def test_vision_tensors_need_a_vision_config(make_model, saved, edit_json):
    directory = saved(make_model(vision=True))
    edit_json(directory / "config.json", vision_config=None)
    with pytest.raises(ValueError, match=r"unexpected \d+ tensors \(model.encoder.*has no vision_config"):
        load_model(directory, "cpu")


@pytest.mark.parametrize(("lost", "message"), [(1, "promises"), (10**9, "cut short at 100 bytes")])
def test_cut_short(make_model, saved, lost, message):
    path = saved(make_model()) / "model.safetensors"
    path.write_bytes(path.read_bytes()[: max(100, path.stat().st_size - lost)])
    with pytest.raises(ValueError, match=f"model.safetensors is .*{message}.*download it again") as error:
        load_model(path.parent, "cpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cut short at 0 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        ((9).to_bytes(8, "little") + b"not json!", "header cannot be read"),
        ((9).to_bytes(8, "little") + b'{"a": 1} ', "header cannot be read"),
        ((9).to_bytes(8, "little") + b"[1, 2, 3]", "header cannot be read"),
    ],
)
def test_other_files_under_the_name(make_model, saved, content, message):
    path = saved(make_model()) / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"model.safetensors.*{message}"):
        load_model(path.parent, "cpu")


def test_header_that_only_safetensors_finds_wrong(make_model, saved):
    path = saved(make_model()) / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    first, second = sorted(
        (name for name in header if name != "__metadata__"), key=lambda n: header[n]["data_offsets"]
    )[:2]
    header[first]["data_offsets"][1] -= 4
    header[second]["data_offsets"][0] -= 4
    text = json.dumps(header).encode().ljust(length)
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged") as error:
        load_model(path.parent, "cpu")
    assert "\n" not in str(error.value)


def test_missing_shard(make_model, saved):
    directory = saved(make_model(), max_shard_bytes=20_000)
    shard = sorted(directory.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=rf"lacks 1 shard \({shard.name}\)"):
        load_model(directory, "cpu")


def test_index_at_odds_with_a_shard(make_model, saved, edit_json):
    directory = saved(make_model(), max_shard_bytes=20_000)
    index = directory / "model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map=where | {"model.decoder.ghost": where[NORM]})
    with pytest.raises(ValueError, match=rf"{where[NORM]} lacks 1 tensor \(model.decoder.ghost\)"):
        load_model(directory, "cpu")
    edit_json(index, weight_map=[])
    with pytest.raises(ValueError, match="has no weight_map"):
        load_model(directory, "cpu")


def test_a_tensor_in_two_shards_is_read_where_the_index_says(make_model, saved):
    model = make_model()
    directory = saved(model, max_shard_bytes=20_000)
    where = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    other = next(file for file in sorted(where.values()) if file != where[NORM])
    stale = load_file(directory / other) | {NORM: torch.zeros(32)}
    save_file(stale, directory / other, metadata={"format": "pt"})
    assert torch.equal(load_model(directory, "cpu").norm.weight, model.norm.weight)


def test_integer_weights_are_named(make_model, saved, rewrite):
    directory = saved(make_model())
    rewrite(directory, lambda tensors: tensors | {NORM: torch.ones(32, dtype=torch.int8)})
    with pytest.raises(ValueError, match=rf"missing 1 tensor \({NORM}\); unexpected 1 tensor \({NORM}\)"):
        load_model(directory, "cpu")


def test_directories_without_a_model(make_model, saved, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a directory"):
        load_model(tmp_path / "nowhere", "cpu")
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        load_model(tmp_path, "cpu")
    directory = saved(make_model())
    (directory / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds neither model.safetensors nor model.safetensors.index.json"):
        load_model(directory, "cpu")


def test_unknown_dtype_and_device(make_model, saved, monkeypatch):
    directory = saved(make_model())
    with pytest.raises(ValueError, match="dtype 'int8' is not one of auto, bfloat16"):
        load_model(directory, "cpu", "int8")
    with pytest.raises(ValueError, match="device 'tpu9' is not known"):
        load_model(directory, "tpu9")
    with pytest.raises(ValueError, match=r"device 'cuda:99' is not there: torch sees \d CUDA"):
        load_model(directory, "cuda:99")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match="device 'mps' is not there"):
        load_model(directory, "mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "mps")


def test_a_mapped_model_outlives_its_file(make_model, saved):
    model = make_model()
    directory = saved(model)
    loaded = load_model(directory, "cpu")
    shutil.rmtree(directory)
    assert torch.equal(loaded.norm.weight, model.norm.weight)
    with torch.no_grad():
        loaded.norm.weight.add_(1)  # private pages: training a mapped network is fine
    assert torch.equal(loaded.norm.weight, model.norm.weight + 1)


def test_writing_to_a_mapped_model_leaves_the_file(make_model, saved):
    model = make_model()
    directory = saved(model)
    with torch.no_grad():
        load_model(directory, "cpu").norm.weight.zero_()
    with safe_open(directory / "model.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor(NORM), model.norm.weight)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_onto_a_gpu(make_model, saved):
    model = make_model()
    loaded = load_model(saved(model), "cuda", "bfloat16").state_dict()
    for name, tensor in model.state_dict().items():
        assert loaded[name].is_cuda
        assert torch.equal(loaded[name].cpu(), tensor.bfloat16())
