"""Verifying: a whole model passes, and every planted fault is found and named."""

import json
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from dgemma.checkpoints import verify as module
from dgemma.checkpoints.load import load_model
from dgemma.checkpoints.release import GOLDEN, TEMPLATES, TEXT, TOKENIZER, Golden, is_release
from dgemma.checkpoints.save import save_model
from dgemma.checkpoints.verify import Finding, compare_logits, verify
from dgemma.cli import app
from dgemma.config import GenerationConfig, ModelConfig
from dgemma.model.network import DiffusionGemma
from dgemma.text.small import character_tokenizer

TEMPLATE = "{{ bos_token }}{% for m in messages %}<|turn>{{ m.role }}\n{{ m.content }}<turn|>\n{% endfor %}"
NORM, EXPERTS = "model.decoder.norm.weight", "model.decoder.layers.0.experts.down_proj"
QUERIES, EXPERT = "model.decoder.layers.0.self_attn.q_proj", "model.decoder.layers.1.experts.2.up_proj"


@pytest.fixture
def whole(make_model, tmp_path) -> Callable[..., Path]:
    """Writes a model with all its files, quantised if asked; returns its directory."""

    def write(quantize: str | None = None) -> Path:
        sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32}
        model = DiffusionGemma(replace(make_model().config, **sizes)).init_weights()
        directory = tmp_path / "model"
        save_model(model, directory, GenerationConfig())
        if quantize:
            save_model(load_model(directory, "cpu", quantize=quantize), directory, GenerationConfig())
        character_tokenizer().save(str(directory / "tokenizer.json"))
        (directory / "chat_template.jinja").write_text(TEMPLATE)
        return directory

    return write


def change(directory: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors")


def wrong(directory: Path) -> dict[str, str]:
    return {finding.check: finding.detail for finding in verify(directory) if finding.verdict == "wrong"}


def fill(name: str, value: float) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors[name].view(-1)[:2].fill_(value)


@pytest.mark.parametrize("quantize", [None, "fp8", "int8", "int4", "w4a8", "nvfp4"])
def test_a_whole_model(whole, quantize):
    directory = whole(quantize)
    seen = []
    findings = list(verify(directory, progress=lambda done, total: seen.append((done, total))))
    verdicts = {finding.check: finding.verdict for finding in findings}
    assert verdicts.pop("logits") == "skipped"
    assert set(verdicts.values()) == {"ok"}
    size = sum(tensor.nbytes for tensor in load_file(directory / "model.safetensors").values())
    assert seen == sorted(seen)
    assert seen[-1] == (size, size)


def test_missing_misshapen_and_strange_tensors(whole):
    directory = whole()

    def edit(tensors):
        del tensors[NORM]
        tensors[f"{QUERIES}.weight"] = torch.ones(3, 64)
        tensors["model.decoder.extra"] = torch.ones(1)

    change(directory, edit)
    found = wrong(directory)
    assert found.keys() == {"tensors"}
    assert f"missing 1 tensor ({NORM})" in found["tensors"]
    assert "unexpected 1 tensor (model.decoder.extra)" in found["tensors"]
    assert f"{QUERIES}.weight: [3, 64], not [64, 64]" in found["tensors"]


@pytest.mark.parametrize("name", [NORM, EXPERTS, "model.encoder.language_model.layers.1.layer_scalar"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_values_that_are_not_finite(whole, name, value):
    directory = whole()
    change(directory, fill(name, value))
    count = "1 value is" if "scalar" in name else "2 values are"
    assert wrong(directory) == {"values": f"1 fault ({name}: {count} not finite)"}


def set_codes(name: str, code: int) -> Callable[[dict[str, Tensor]], object]:
    def edit(tensors):
        tensors[name].view(torch.uint8).view(-1)[:3] = code

    return edit


@pytest.mark.parametrize(
    ("quantize", "edit", "fault"),
    [
        ("fp8", set_codes(f"{QUERIES}.weight", 0x7F), f"{QUERIES}: 3 float8 codes are NaN"),
        ("fp8", set_codes(f"{EXPERT}.weight", 0xFF), f"{EXPERT}: 3 float8 codes are NaN"),
        ("fp8", fill(f"{QUERIES}.weight_scale", 0), f"{QUERIES}: 2 scales are not finite and above zero"),
        ("int8", fill(f"{EXPERT}.weight_scale", float("nan")), f"{EXPERT}: 2 scales are not finite and above zero"),
        ("int4", fill(f"{EXPERT}.weight_scale", float("inf")), f"{EXPERT}: 2 scales are not finite and above zero"),
        ("int4", fill(f"{EXPERT}.weight_shape", 9), f"{EXPERT}.weight_shape tells [9, 9]; the config makes it"),
        ("nvfp4", set_codes(f"{EXPERT}.weight_scale", 0x7F), f"{EXPERT}: 3 float8 scales are NaN"),
        ("nvfp4", fill(f"{EXPERT}.weight_global_scale", 0), f"{EXPERT}: its factor is zero or not finite"),
        ("nvfp4", lambda t: t.pop(f"{EXPERT}.weight_scale"), "(nvfp4) says: it lacks weight_scale"),
    ],
)
def test_faults_of_quantised_matrices(whole, quantize, edit, fault):
    directory = whole(quantize)
    change(directory, edit)
    found = wrong(directory)
    assert found.keys() == {"values"}
    assert found["values"].startswith("1 fault (")
    assert fault in found["values"]


def test_scales_that_lead_beyond_the_dtype(whole):
    directory = whole("fp8")
    change(directory, fill(f"{QUERIES}.weight_scale", 3e38))
    assert f"{QUERIES}: its codes times its scales are not all finite" in wrong(directory)["values"]


def test_an_expert_that_is_missing(whole):
    directory = whole("int4")
    change(directory, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(EXPERT)])
    assert "gate_up_proj is not whole: rows are missing of 1 expert (2)" in wrong(directory)["tensors"]


def test_a_truncated_file(whole):
    path = whole() / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    findings = {finding.check: finding for finding in verify(path.parent)}
    assert findings["tensors"].verdict == "wrong"
    assert "model.safetensors is damaged" in findings["tensors"].detail
    assert findings["values"].verdict == "skipped"
    assert findings["tokenizer"].verdict == "ok"


@pytest.mark.parametrize(
    ("file", "content", "check", "message"),
    [
        ("tokenizer.json", "{", "tokenizer", "tokenizer.json: not a tokenizer"),
        (
            "tokenizer_config.json",
            '{"eos_token": "<bos>"}',
            "tokenizer",
            "its eos token is 2; that of config.json is 1",
        ),
        ("chat_template.jinja", "{% if %}", "chat template", "chat_template.jinja: chat template, line 1"),
        ("chat_template.jinja", "{{ messages[0].nothing.at_all }}", "chat template", "chat template: "),
        ("chat_template.jinja", "always the same", "chat template", "a user's message is not in what it renders"),
        ("generation_config.json", '{"t_min": 2}', "generation config", "t_min must not exceed t_max"),
        ("generation_config.json", '{"eos_token_id": [1, 128]}', "generation config", "128 is beyond the vocabulary"),
        ("config.json", '{"model_type": "gemma"}', "config", "model_type is 'gemma'"),
    ],
)
def test_files_beside_the_weights(whole, file, content, check, message):
    directory = whole()
    (directory / file).write_text(content)
    found = wrong(directory)
    assert found.keys() == {check}
    assert message in found[check]


def test_a_tokenizer_of_other_tokens(whole):
    directory = whole()
    character_tokenizer(129).save(str(directory / "tokenizer.json"))
    assert wrong(directory) == {"tokenizer": "129 tokens, but vocab_size is 128"}
    text = character_tokenizer().to_str().replace("<turn|>", "<Turn|>")
    (directory / "tokenizer.json").write_text(text)
    assert wrong(directory) == {"tokenizer": "it lacks 1 special token (<turn|>)"}
    (directory / "chat_template.jinja").unlink()  # who does not chat needs none
    assert not wrong(directory)


def golden_of(model: DiffusionGemma, shift: float = 0.0) -> Golden:
    """Its own logits, of which one is moved."""
    prompt = (2, 5, 7, 11)
    with torch.no_grad():
        cache = model.new_cache()
        model.encode(torch.tensor([prompt]), cache)
        logits = model.denoise(torch.arange(model.config.canvas_length)[None], cache)[0, :4, :6].clone()
    logits[3, 5] += shift
    return Golden(prompt, tuple(map(tuple, logits.tolist())))


def test_golden_logits(make_model):
    model = make_model()
    assert compare_logits(model, golden_of(model)).verdict == "ok"
    assert compare_logits(model, golden_of(model, 0.4)).verdict == "ok"
    finding = compare_logits(model, golden_of(model, -0.7))
    assert finding.verdict == "wrong"
    assert "off by 0.70 at most, where 0.5 is allowed" in finding.detail


def test_golden_logits_of_quantised_weights(whole):
    model = load_model(whole("int8"), "cpu")
    assert compare_logits(model, golden_of(model, 2.9)).verdict == "ok"
    assert compare_logits(model, golden_of(model, 3.1)).verdict == "wrong"


def test_when_logits_are_compared(whole, monkeypatch):
    directory = whole()

    def last(**options: bool) -> Finding:
        *_, finding = verify(directory, **options)
        return finding

    monkeypatch.setattr(module, "is_release", lambda config: True)
    monkeypatch.setattr(module, "GOLDEN", golden_of(load_model(directory, "cpu")))
    assert last() == Finding("logits", "ok", "off by 0.00 at most, where 0.5 is allowed")
    assert last(logits=False) == Finding("logits", "skipped", "not asked for")
    change(directory, fill(NORM, float("nan")))
    assert last() == Finding("logits", "skipped", "the weights are wrong")


def test_constants_are_the_releases(shared, make_model):
    config = ModelConfig.from_file(shared / "config.json")
    assert is_release(config)
    assert not is_release(replace(config, top_k_experts=4))
    assert not is_release(make_model().config)
    assert TEXT.num_hidden_layers == 30
    names = ("tokenizer.json", "chat_template_v1.jinja", "chat_template_v2.jinja")
    tokenizer, first, second = (sha256((shared / name).read_bytes()).hexdigest() for name in names)
    assert tokenizer == TOKENIZER
    assert {first: "first", second: "second"} == TEMPLATES
    published = json.loads((shared / "golden_logits_text.json").read_text())
    assert list(GOLDEN.prompt) == published["prompt_ids"]
    torch.testing.assert_close(
        torch.tensor(GOLDEN.logits), torch.tensor(published["logits[0,:10,:12]"]), atol=1e-4, rtol=0
    )


def test_the_released_tokenizer_and_templates(shared, tmp_path):
    """Of a directory without weights: these are what is wrong with it."""
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        (tmp_path / name).symlink_to(shared / name)
    (tmp_path / "chat_template.jinja").symlink_to(shared / "chat_template_v2.jinja")
    findings = {finding.check: finding for finding in verify(tmp_path)}
    assert [check for check, finding in findings.items() if finding.verdict == "wrong"] == ["tensors"]
    assert findings["tokenizer"].detail == "262,144 tokens, the release's file"
    assert findings["chat template"].detail == "the release's second version"


def test_an_adapter_is_not_verified_alone(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/model"}')
    told = f"{tmp_path} is an adapter of some/model: verify that, or what `dgemma merge` makes of both"
    assert list(verify(tmp_path)) == [Finding("config", "wrong", told)]
    (tmp_path / "adapter_config.json").write_text("{")
    assert "adapter_config.json" in wrong(tmp_path)["config"]


def test_command(whole):
    directory = whole()
    done = CliRunner().invoke(app, ["verify", str(directory), "--no-logits"])
    assert done.exit_code == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["ok"] * 6 + ["skipped"]
    (directory / "chat_template.jinja").write_text("{{")
    done = CliRunner().invoke(app, ["verify", str(directory), "--json"])
    assert done.exit_code == 1
    told = {finding["check"]: finding["verdict"] for finding in json.loads(done.stdout)}
    assert told["chat template"] == "wrong"
    assert told["tensors"] == "ok"
