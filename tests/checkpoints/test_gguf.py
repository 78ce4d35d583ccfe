"""GGUF files of llama.cpp's converter against the safetensors, config and tokenizer of the same weights."""

import json
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import dgemma
from dgemma.checkpoints.gguf import read_gguf
from dgemma.checkpoints.gguf_header import GgufTensor, own_name, read_gguf_header
from dgemma.checkpoints.gguf_header import stored_name as name_in_file
from dgemma.checkpoints.inspect import count_parameters, inspect_gguf
from dgemma.checkpoints.names import stored_name
from dgemma.checkpoints.verify_gguf import verify_gguf
from dgemma.cli import app
from dgemma.config import GenerationConfig, ModelConfig
from dgemma.model.network import DiffusionGemma
from dgemma.quant.ggml import BLOCKS, decode
from dgemma.quant.modules import matrices
from dgemma.terminal.info import describe

gguf = pytest.importorskip("gguf", reason="the gguf package writes the broken files, and is the oracle")

PART = "model-{:05}-of-{:05}.gguf"
Rewrite = Callable[..., Path]


@pytest.fixture(scope="module")
def small(shared: Path) -> Path:
    return shared / "small"


@pytest.fixture
def rewrite(small: Path, tmp_path: Path) -> Rewrite:
    """Writes model-q4_k_m.gguf again, with changes, and returns its path.

    keys: new values, None to leave one out. tensors: by stored name, a new array in float32 or float16, None to leave
    one out. rename: from stored name to another.
    """

    def write(
        keys: dict[str, Any] | None = None,
        tensors: dict[str, np.ndarray | None] | None = None,
        rename: dict[str, str] | None = None,
        architecture: str = "diffusion-gemma",
        **options: Any,
    ) -> Path:
        reader = gguf.GGUFReader(small / "model-q4_k_m.gguf")
        writer = gguf.GGUFWriter(tmp_path / "model.gguf", architecture, **options)
        own = {name: (field.contents(), field.types) for name, field in reader.fields.items()}
        for name, value in (keys or {}).items():
            kind = gguf.GGUFValueType.get_type(value) if value is not None else None
            own[name] = (value, own[name][1] if name in own and not isinstance(value, list) else [kind])
        for name, (value, types) in own.items():
            if value is not None and not name.startswith("GGUF.") and name != "general.architecture":
                writer.add_key_value(name, value, types[0], types[-1] if len(types) > 1 else None)
        changed = dict(tensors or {})
        for tensor in reader.tensors:
            name = (rename or {}).get(tensor.name, tensor.name)
            array = changed.pop(tensor.name, tensor.data)
            if array is tensor.data:
                writer.add_tensor(name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
            elif array is not None:
                writer.add_tensor(name, array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / "model.gguf"

    return write


def values(tensor: GgufTensor) -> torch.Tensor:
    """Of a tensor in any type: float32, bfloat16 for BF16."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has no read-only tensors
        data = torch.from_numpy(tensor.data)
    if tensor.type == "BF16":
        return data.view(torch.bfloat16)
    return decode(tensor.type, data) if tensor.type in BLOCKS else data.float()


def test_bf16_holds_the_same_weights(small: Path) -> None:
    file = read_gguf(small / "model-bf16.gguf")
    wanted = load_file(small / "model.safetensors")
    assert {stored_name(name) for name in file.tensors} == {name for name in wanted if "vision" not in name}
    for name, tensor in file.tensors.items():
        value, same = values(tensor), wanted[stored_name(name)]
        assert tensor.shape == tuple(same.shape), name
        assert torch.equal(value.float(), same.float()), name
        assert tensor.file == small / "model-bf16.gguf"
    assert {tensor.type for tensor in file.tensors.values()} == {"F32", "BF16"}


@pytest.mark.parametrize("name", ["q8_0", "q4_k_m"])
def test_quantised_files_decode_as_the_reference_does(small: Path, name: str) -> None:
    path = small / f"model-{name}.gguf"
    file = read_gguf(path)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    exact = load_file(small / "model.safetensors")
    assert len(file.tensors) == len(stored) - 1  # rope_freqs
    names = {"layers.2.experts.down_proj": "blk.2.ffn_down_exps.weight", "embed_tokens.weight": "token_embd.weight"}
    for own, tensor in file.tensors.items():
        if own in names:
            theirs = stored[names[own]]
            assert np.array_equal(tensor.data, theirs.data), own
        if tensor.type in BLOCKS:
            reference = gguf.quants.dequantize(np.array(tensor.data), gguf.GGMLQuantizationType[tensor.type])
            assert np.array_equal(values(tensor).numpy().view(np.int32), reference.view(np.int32)), own
        weights = exact[stored_name(own)].float()
        assert tensor.shape == tuple(weights.shape), own
        distance = (values(tensor) - weights).norm() / weights.norm()
        assert distance < (0.01 if name == "q8_0" else 0.09), own


def test_config_is_that_of_config_json(small: Path) -> None:
    for path in small.glob("*.gguf"):
        file = read_gguf(path)
        wanted = ModelConfig.from_file(small / "config.json")
        # A GGUF file has no images, and does not say how weights were drawn.
        images = {"vision": None, "image_token_id": None, "boi_token_id": None, "eoi_token_id": None}
        assert file.config == replace(wanted, **images, initializer_range=file.config.initializer_range)
        # Of the ends it names only one; the other two are known by their text, which this vocabulary lacks.
        generation = GenerationConfig.from_file(small / "generation_config.json")
        assert file.generation == replace(generation, eos_token_id=(1,))
        assert file.keys["general.architecture"] == "diffusion-gemma"
        assert len(file.keys["tokenizer.ggml.tokens"]) == wanted.vocab_size


def test_decoding_keys_and_ends(rewrite: Rewrite, small: Path) -> None:
    told = {"eb_max_steps": 7, "eb_t_min": 0.25, "eb_t_max": 0.7, "eb_entropy_bound": 0.3}
    told |= {"eb_stability_threshold": 2, "eb_confidence_threshold": 0.01}
    tokens = read_gguf(small / "model-q4_k_m.gguf").keys["tokenizer.ggml.tokens"]
    tokens[300], tokens[106] = "<turn|>", "<|tool_response>"
    keys = {"tokenizer.ggml.tokens": tokens} | {f"diffusion.{name}": value for name, value in told.items()}
    options = {"max_denoising_steps": 7, "t_min": 0.25, "t_max": 0.7, "entropy_bound": 0.3}
    wanted = GenerationConfig(**options, stability_threshold=2, confidence_threshold=0.01, eos_token_id=(1, 300, 106))
    keys["diffusion-gemma.final_logit_softcapping"] = 20.0
    file = read_gguf(rewrite(keys=keys))
    assert file.generation == wanted
    assert file.config.final_logit_softcapping == 20.0
    assert read_gguf(rewrite(keys={f"diffusion.{name}": None for name in told})).generation == GenerationConfig()


def test_unknown_keys_are_warned_of(rewrite: Rewrite, small: Path) -> None:
    path = rewrite(keys={"diffusion-gemma.rope.scaling": 2.0, "diffusion.eb_new": 1, "general.url": "x"})
    with pytest.warns(UserWarning, match=r"2 keys \(diffusion-gemma\.rope\.scaling, diffusion\.eb_new\) not under"):
        file = read_gguf(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_gguf(small / "model-q4_k_m.gguf").config == file.config


def test_float16(rewrite: Rewrite) -> None:
    norm = np.linspace(0.5, 1.5, 256, dtype=np.float16)
    tensor = read_gguf(rewrite(tensors={"output_norm.weight": norm})).tensors["norm.weight"]
    assert (tensor.type, tensor.shape, tensor.data.dtype) == ("F16", (256,), np.float16)
    assert np.array_equal(tensor.data, norm)


def test_a_split_file_is_read_from_any_part(rewrite: Rewrite, small: Path, tmp_path: Path) -> None:
    rewrite(split_max_tensors=30)
    whole = read_gguf(small / "model-q4_k_m.gguf")
    parts = sorted(tmp_path.glob("*.gguf"))
    assert [part.name for part in parts] == [PART.format(i, 3) for i in (1, 2, 3)]
    for part in parts:
        file = read_gguf(part)
        assert (file.config, file.generation) == (whole.config, whole.generation)
        assert file.tensors.keys() == whole.tensors.keys()
        assert all(np.array_equal(file.tensors[name].data, tensor.data) for name, tensor in whole.tensors.items())
    assert {tensor.file for tensor in file.tensors.values()} == set(parts)
    parts[1].rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError, match=r"lacks 1 part \(model-00002-of-00003\.gguf\) of model"):
        read_gguf(parts[0])
    parts[0].rename(tmp_path / "named.gguf")
    with pytest.raises(ValueError, match=r"one of 3 parts, but its name does not end like '-00001-of-00003\.gguf'"):
        read_gguf(tmp_path / "named.gguf")


@pytest.mark.parametrize("size", [5, 20, 60, 1000, 20_000, 30_000, 2_000_000])
def test_files_that_are_cut_short(small: Path, tmp_path: Path, size: int) -> None:
    path = tmp_path / "short.gguf"
    path.write_bytes((small / "model-q4_k_m.gguf").read_bytes()[:size])
    with pytest.raises(ValueError, match=r"short\.gguf (is damaged: its header|cannot be read: .*cut short)"):
        read_gguf(path)


def test_other_files(small: Path, tmp_path: Path, rewrite: Rewrite) -> None:
    with pytest.raises(FileNotFoundError):
        read_gguf(tmp_path / "absent.gguf")
    path = tmp_path / "other.gguf"
    for content in (b"", b"version https://git-lfs", (small / "model.safetensors").read_bytes()[:100]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"other\.gguf is no GGUF file: it begins with"):
            read_gguf(path)
    path.write_bytes(b"GGUF\x00\x00\x00\x03" + bytes(64))
    with pytest.raises(ValueError, match="version 50331648, not 2 or 3"):
        read_gguf(path)
    with pytest.raises(ValueError, match="its architecture is 'gemma4', not 'diffusion-gemma'"):
        read_gguf(rewrite(architecture="gemma4"))
    path.write_bytes(b"GGUF\x03" + bytes(19))
    with pytest.raises(ValueError, match="its architecture is None"):
        read_gguf(path)


def test_tensors_that_do_not_fit_are_all_named(rewrite: Rewrite) -> None:
    wrong = np.zeros((4, 8), dtype=np.float32)
    path = rewrite(
        rename={"blk.0.attn_v.weight": "blk.0.attn_qkv.weight", "output_norm.weight": "output.weight"},
        tensors={"blk.1.ffn_gate_inp.weight": wrong},
    )
    with pytest.raises(ValueError, match=r"model\.gguf does not fit its own keys") as error:
        read_gguf(path)
    for part in (
        "missing 2 tensors (blk.0.attn_v.weight, output_norm.weight)",
        "unexpected 2 tensors (blk.0.attn_qkv.weight, output.weight)",
        "wrongly shaped 1 tensor (blk.1.ffn_gate_inp.weight: [4, 8], not [4, 256])",
    ):
        assert part in str(error.value)


def test_unknown_types_are_named(small: Path, tmp_path: Path) -> None:
    content = bytearray((small / "model-q4_k_m.gguf").read_bytes())
    for name in (b"self_cond_up.weight", b"token_embd.weight"):
        at = content.index(name) + len(name) + 4 + 2 * 8  # behind the name: dimensions, two sizes, type
        content[at : at + 4] = (10).to_bytes(4, "little")
    path = tmp_path / "types.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"2 tensors \(self_cond_up\.weight: stored as ggml's type 10; known are F32"):
        read_gguf(path)


def test_rope_factors_must_be_those_of_the_config(rewrite: Rewrite) -> None:
    good = np.where(np.arange(64) < 16, 1, np.float32(1e30)).astype(np.float32)
    assert read_gguf(rewrite(tensors={"rope_freqs.weight": good})).config.rope_full.partial == 0.25
    for factors in (good[::-1].copy(), good[:32].copy(), np.where(good > 1, 8, good), good * 2):
        with pytest.raises(ValueError, match=r"rope_freqs\.weight .* is not 1 for the first pairs"):
            read_gguf(rewrite(tensors={"rope_freqs.weight": factors}))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("diffusion-gemma.expert_count", None, r"lacks 1 key \(diffusion-gemma\.expert_count\)"),
        ("diffusion.canvas_length", None, r"lacks 1 key \(diffusion\.canvas_length\)"),
        ("diffusion-gemma.attention.causal", True, "attention.causal True is not supported, only False"),
        ("diffusion-gemma.attention.shared_kv_layers", 2, "attention.shared_kv_layers 2 is not supported, only 0"),
        ("diffusion-gemma.attention.value_length", 64, "attention.value_length 64 is not attention.key_length, 128"),
        ("diffusion-gemma.rope.dimension_count", 32, "rope.dimension_count 32 is not attention.key_length, 128"),
        ("diffusion-gemma.block_count", 4, r"sliding_window_pattern \[True, True, False\] is not a list of 4 booleans"),
        ("diffusion-gemma.attention.sliding_window_pattern", [True] * 3, r"is not a list of 3 booleans, some false"),
        ("general.alignment", 0, "general.alignment is 0; download"),
        ("diffusion-gemma.attention.head_count_kv", [2, 1, 1], r"head_count_kv \[2, 1, 1\] is not one number a layer"),
        ("diffusion-gemma.attention.head_count_kv", [2, 2], r"head_count_kv \[2, 2\] is not one number a layer"),
        ("diffusion-gemma.expert_used_count", 9, r"model\.gguf: top_k_experts 9 > num_experts 4"),
        ("tokenizer.ggml.padding_token_id", 1024, r"pad_token_id 1024 is not one of 1024 tokens"),
        ("tokenizer.ggml.tokens", ["a", "b"], r"token_embd\.weight has 1024 rows for 2 tokens"),
        ("diffusion.eb_t_min", 3.0, r"model\.gguf: t_min must not exceed t_max"),
    ],
)
def test_keys_that_make_no_sense_are_named(rewrite: Rewrite, key: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_gguf(rewrite(keys={key: value}))


def test_a_missing_embedding_is_named(rewrite: Rewrite) -> None:
    with pytest.raises(ValueError, match=r"lacks 1 tensor \(token_embd\.weight\)"):
        read_gguf(rewrite(tensors={"token_embd.weight": None}))


def test_loaded_whole(small: Path) -> None:
    """From the file alone: the bfloat16 one is the released directory's twin, the others their own dequantisation."""
    released = dgemma.load(small, dtype="float32")
    prompt = released.tokenizer.encode("What is a canvas?")
    canvas = torch.arange(released.model.config.canvas_length)[None]

    @torch.inference_mode()
    def logits(lm: dgemma.LanguageModel) -> torch.Tensor:
        cache = lm.model.new_cache()
        lm.model.encode(torch.tensor([prompt]), cache)
        return lm.model.denoise(canvas, cache)

    twin = dgemma.load(small / "model-bf16.gguf", dtype="float32")
    assert twin.tokenizer.encode("What is a canvas?") == prompt
    assert torch.equal(logits(twin), logits(released))
    for kind in ("q8_0", "q4_k_m"):
        packed = dgemma.load(small / f"model-{kind}.gguf", dtype="float32")
        inside = matrices(packed.model)
        assert sum(matrix.nbytes for matrix in inside.values()) < (small / f"model-{kind}.gguf").stat().st_size
        plain = DiffusionGemma(packed.model.config)
        state = {name: value for name, value in packed.model.state_dict().items() if name in plain.state_dict()}
        state |= {name: matrix.dense() for name, matrix in inside.items()}
        plain.load_state_dict(state)
        expected = logits(replace(packed, model=plain.eval()))
        torch.testing.assert_close(logits(packed), expected, rtol=0, atol=1e-4 * float(expected.std()))


def test_names_there_and_back(small: Path) -> None:
    for name in read_gguf(small / "model-q8_0.gguf").tensors:
        assert own_name(name_in_file(name)) == name
    assert own_name("rope_freqs.weight") is own_name("blk.0.attn_qkv.weight") is None


@pytest.mark.parametrize("name", ["bf16", "q8_0", "q4_k_m"])
def test_info(small: Path, name: str) -> None:
    path = small / f"model-{name}.gguf"
    stored = gguf.GGUFReader(path).tensors
    info = inspect_gguf(read_gguf_header(path))
    sizes: Counter[str] = Counter()
    for tensor in stored:
        sizes[tensor.tensor_type.name] += int(tensor.n_bytes)
    assert (info.tensors, info.bytes_by_dtype, info.shards) == (len(stored), dict(sizes), (path.name,))
    assert info.elements == count_parameters(read_gguf(path).config)
    experts = [tensor for tensor in stored if "_exps.weight" in tensor.name]
    assert info.bytes_by_part["experts"] == sum(int(tensor.n_bytes) for tensor in experts)
    assert sum(info.bytes_by_part.values()) == sum(sizes.values()) - 64 * 4  # rope_freqs
    lines = list(describe(path))
    [line] = [line for line in lines if line.startswith("format")]
    counts = Counter(tensor.tensor_type.name for tensor in stored)
    assert line.split("GGUF: ")[1].replace(" tensors", "").split(", ") == [f"{t} {n}" for t, n in counts.most_common()]
    bits = 8 * info.bytes_by_part["experts"] / info.elements["experts"]
    assert any(line.startswith("  experts") and line.endswith(f"{bits:.2f} bits a weight") for line in lines)


def test_info_does_not_wait_for_torch(small: Path) -> None:
    path = small / "model-q4_k_m.gguf"
    code = f"import sys; from dgemma import cli; sys.argv[1:] = ['info', {str(path)!r}]\n"
    code += "try: cli.main()\nfinally: print('torch' in sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "False\n")
    assert done.stdout.splitlines() == list(describe(path))


def wrong(path: Path) -> dict[str, str]:
    return {finding.check: finding.detail for finding in verify_gguf(path) if finding.verdict == "wrong"}


@pytest.mark.parametrize("name", ["bf16", "q8_0", "q4_k_m"])
def test_a_whole_file_is_verified(small: Path, name: str) -> None:
    path = small / f"model-{name}.gguf"
    seen: list[tuple[int, int]] = []
    findings = {f.check: f for f in verify_gguf(path, progress=lambda done, total: seen.append((done, total)))}
    verdicts = {check: finding.verdict for check, finding in findings.items()}
    assert verdicts.pop("chat template") == ("ok" if "tokenizer.chat_template" in read_gguf(path).keys else "skipped")
    assert verdicts.pop("logits") == "skipped"
    assert verdicts == dict.fromkeys(("config", "tensors", "values", "tokenizer"), "ok")
    size = sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors)
    assert seen == sorted(seen)
    assert seen[-1] == (size, size)


@pytest.mark.parametrize(
    ("name", "tensor", "at", "count"),
    [
        ("q4_k_m", "blk.2.ffn_gate_up_exps.weight", -144, "256 values are"),  # scale of the last expert's last block
        ("q8_0", "token_embd.weight", 0, "32 values are"),
        ("bf16", "blk.1.ffn_down_exps.weight", -2, "1 value is"),
    ],
)
def test_values_that_are_not_finite_are_found(
    small: Path, tmp_path: Path, name: str, tensor: str, at: int, count: str
) -> None:
    source = small / f"model-{name}.gguf"
    [entry] = [each for each in gguf.GGUFReader(source).tensors if each.name == tensor]
    content = bytearray(source.read_bytes())
    begin = int(entry.data_offset) + (at if at >= 0 else int(entry.n_bytes) + at)
    content[begin : begin + 2] = b"\xff\x7f"  # NaN as float16 and as bfloat16
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    assert wrong(path) == {"values": f"1 fault ({tensor}: {count} not finite)"}


def test_faults_of_a_file_are_found(rewrite: Rewrite, small: Path, tmp_path: Path) -> None:
    assert wrong(rewrite(rename={"output_norm.weight": "output.weight"})).keys() == {"tensors"}
    assert "missing 1 tensor (output_norm.weight)" in wrong(tmp_path / "model.gguf")["tensors"]
    assert "model is 'llama'" in wrong(rewrite(keys={"tokenizer.ggml.model": "llama"}))["tokenizer"]
    assert "line 1" in wrong(rewrite(keys={"tokenizer.chat_template": "{% if %}"}))["chat template"]
    said = wrong(rewrite(keys={"tokenizer.chat_template": "always the same"}))["chat template"]
    assert said == "chat template: a user's message is not in what it renders"
    path = tmp_path / "short.gguf"
    path.write_bytes((small / "model-q4_k_m.gguf").read_bytes()[:2_000_000])
    found = list(verify_gguf(path))
    assert [(finding.check, finding.verdict) for finding in found] == [("config", "wrong")]
    assert "cut short" in found[0].detail


def test_verify_command(small: Path, rewrite: Rewrite) -> None:
    done = CliRunner().invoke(app, ["verify", str(small / "model-q4_k_m.gguf")])
    assert done.exit_code == 0
    assert [line.split()[0] for line in done.stdout.splitlines()[:4]] == ["ok"] * 4
    done = CliRunner().invoke(app, ["verify", str(rewrite(tensors={"output_norm.weight": None})), "--json"])
    assert done.exit_code == 1
    assert {f["check"] for f in json.loads(done.stdout) if f["verdict"] == "wrong"} == {"tensors"}
