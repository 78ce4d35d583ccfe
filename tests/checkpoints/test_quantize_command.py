"""`dgemma quantize`: what it writes is what the compressed-tensors package reads out of it, and nothing else."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.utils import match_named_modules
from safetensors.torch import load_file
from torch import Tensor, nn
from typer.testing import CliRunner, Result

from dgemma.checkpoints.empty import empty_model
from dgemma.checkpoints.load import load_model
from dgemma.checkpoints.names import stored_name
from dgemma.checkpoints.save import save_model
from dgemma.cli import app
from dgemma.config import GenerationConfig, ModelConfig
from dgemma.model.network import DiffusionGemma
from dgemma.quant.modules import matrices
from dgemma.quant.quantize import EMBEDDING, Quantization
from dgemma.text.small import character_tokenizer

SIZES = {"vocab_size": 128, "hidden_size": 128, "intermediate_size": 192, "moe_intermediate_size": 64}


@dataclass(frozen=True)
class Case:
    """bits: a weight in memory, scales included, by the columns of its matrix."""

    format: str
    bits: dict[int, float]
    group: int = 32
    embeddings: bool = False

    @property
    def flags(self) -> list[str]:
        return ["--format", self.format, "--group", str(self.group), *["--embeddings"] * self.embeddings]


BY_ROWS = {columns: 8 + 16 / columns for columns in (64, 128, 192)}
CASES = [
    Case("int8", BY_ROWS),
    Case("int8", BY_ROWS, embeddings=True),
    Case("fp8", BY_ROWS),
    Case("fp8", BY_ROWS, embeddings=True),
    Case("int4", dict.fromkeys(BY_ROWS, 4.5)),
    Case("int4", dict.fromkeys(BY_ROWS, 4.25), group=64),
    Case("int4", dict.fromkeys(BY_ROWS, 4.5), embeddings=True),
    Case("w4a8", {columns: 4.25 + 32 / columns for columns in BY_ROWS}),
    Case("w4a8", {columns: 4.125 + 32 / columns for columns in BY_ROWS}, group=64, embeddings=True),
    Case("nvfp4", dict.fromkeys(BY_ROWS, 4.5)),
    Case("nvfp4", dict.fromkeys(BY_ROWS, 4.5), embeddings=True),
]


@pytest.fixture(scope="module")
def plain(make_model, tmp_path_factory) -> Path:
    """A model in bfloat16, vision tower and tokenizer included."""
    directory = tmp_path_factory.mktemp("plain") / "model"
    config = replace(make_model().config, **SIZES, initializer_range=0.2)
    save_model(DiffusionGemma(config).init_weights().bfloat16(), directory, GenerationConfig(t_min=0.25))
    character_tokenizer().save(str(directory / "tokenizer.json"))
    return directory


def quantize(model: Path, out: Path, *flags: str) -> Result:
    return CliRunner().invoke(app, ["quantize", str(model), "--out", str(out), *flags])


def modules_of(config: ModelConfig) -> nn.Module:
    """Released names as a tree of modules of the classes that the package looks for, experts one by one."""
    root = nn.Module()

    def put(path: str, module: nn.Module) -> None:
        at = root
        *parents, last = path.split(".")
        for name in parents:
            if name not in dict(at.named_children()):
                at.add_module(name, nn.Module())
            at = at.get_submodule(name)
        at.add_module(last, module)

    with torch.device("meta"):
        for name, tensor in empty_model(config, torch.bfloat16).state_dict().items():
            module = stored_name(name).removesuffix(".weight")
            if name == EMBEDDING:
                put(module, nn.Embedding(*tensor.shape))
            elif tensor.dim() == 3:
                stack, _, which = module.rpartition(".")
                for expert in range(tensor.shape[0]):
                    for half in ["down"] if which == "down_proj" else ["gate", "up"]:
                        put(f"{stack}.{expert}.{half}_proj", nn.Linear(1, 1))
            elif name.endswith("_proj.weight") or name.endswith("router.proj.weight"):
                put(module, nn.Linear(1, 1))
        put("lm_head", nn.Linear(1, 1))
    return root


def schemes_of(directory: Path) -> dict[str, QuantizationScheme]:
    """By module, as the package reads the config and finds its targets."""
    values = json.loads((directory / "config.json").read_text())
    config = QuantizationConfig.model_validate(values["quantization_config"])
    assert config.quantization_status == "compressed"
    model = modules_of(ModelConfig.from_dict(values))
    found: dict[str, QuantizationScheme] = {}
    for scheme in config.config_groups.values():
        for name, _ in match_named_modules(model, scheme.targets, config.ignore):
            assert name not in found
            found[name] = scheme
    return found


def decompressed(parts: dict[str, Tensor], scheme: QuantizationScheme) -> Tensor:
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    return compressor.decompress(parts, scheme)["weight"]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.format}-{c.group}{'-embeddings' * c.embeddings}")
def test_the_package_reads_what_was_written(plain: Path, tmp_path: Path, case: Case) -> None:
    done = quantize(plain, tmp_path, *case.flags)
    assert done.exit_code == 0, done.output
    tensors, schemes = load_file(tmp_path / "model.safetensors"), schemes_of(tmp_path)
    whole: dict[str, Tensor] = {}
    for module, scheme in schemes.items():
        parts = {name.rpartition(".")[2]: name for name in tensors if name.rpartition(".")[0] == module}
        whole[module] = decompressed({part: tensors.pop(name) for part, name in parts.items()}, scheme)
    before = load_file(plain / "model.safetensors")
    for name, tensor in tensors.items():  # what no scheme accounts for is as it was
        assert torch.equal(tensor, before[name]), name

    model = load_model(tmp_path, "cpu")
    packed = matrices(model)
    asked = Quantization(case.format, case.group, case.embeddings)
    assert packed.keys() == asked.chosen(empty_model(model.config, torch.bfloat16).state_dict())
    for name, matrix in packed.items():
        module = stored_name(name).removesuffix(".weight")
        stack, _, which = module.rpartition(".")
        halves = ["down_proj"] if which == "down_proj" else ["gate_proj", "up_proj"]
        dense = matrix.dense()
        for expert, each in enumerate(dense if dense.dim() == 3 else [dense]):
            wanted = [f"{stack}.{expert}.{half}" for half in halves] if dense.dim() == 3 else [module]
            theirs = torch.cat([whole.pop(name) for name in wanted])
            assert theirs.dtype == each.dtype == torch.bfloat16
            assert torch.equal(each, theirs), name
    assert not whole

    for name, matrix in packed.items():
        columns = matrix.shape[-1]
        bits = case.bits[columns] if ".experts." in name else BY_ROWS[columns]  # four bits are for the experts
        factor = 32 / columns if matrix.kind == "nvfp4" else 0  # for each row in memory
        assert matrix.nbytes * 8 / matrix.shape.numel() == pytest.approx(bits + factor), name


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.format}-{c.group}{'-embeddings' * c.embeddings}")
def test_it_loads_as_what_was_quantised_while_reading(plain: Path, tmp_path: Path, case: Case) -> None:
    assert quantize(plain, tmp_path, *case.flags).exit_code == 0
    loaded = load_model(tmp_path, "cpu")
    direct = load_model(plain, "cpu", quantize=Quantization(case.format, case.group, case.embeddings))
    ours, theirs = loaded.state_dict(), direct.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    for name, matrix in matrices(direct).items():
        assert getattr(matrix, "activations", None) == getattr(matrices(loaded)[name], "activations", None)
    assert loaded.config == direct.config
    assert GenerationConfig.from_file(tmp_path / "generation_config.json").t_min == 0.25
    assert (tmp_path / "tokenizer.json").read_bytes() == (plain / "tokenizer.json").read_bytes()


def test_the_embedded_model(tmp_path: Path) -> None:
    assert quantize(Path("tiny"), tmp_path, "--format", "int4").exit_code == 0
    before, after = (load_file(path / "model.safetensors") for path in (_tiny(), tmp_path))
    size = lambda tensors: sum(tensor.nbytes for name, tensor in tensors.items() if ".experts." in name)  # noqa: E731
    shapes = sum(tensor.nbytes for name, tensor in after.items() if name.endswith("weight_shape"))
    kept = size({name: tensor for name, tensor in after.items() if not name.endswith("weight_shape")})
    assert kept == size(before) * 4.5 / 32
    assert shapes < size(after) / 50


def _tiny() -> Path:
    from dgemma import embedded

    directory = embedded.directory("tiny")
    assert directory
    return directory


def test_what_is_quantised_is_refused(plain: Path, tmp_path: Path) -> None:
    assert quantize(plain, tmp_path / "once", "--format", "int4").exit_code == 0
    done = quantize(tmp_path / "once", tmp_path / "twice", "--format", "int8")
    assert f"{tmp_path / 'once'} is quantised already: quantize='int8' has no effect" in str(done.exception)
    assert not (tmp_path / "twice").exists()


def test_a_group_that_does_not_divide_is_refused(plain: Path, tmp_path: Path) -> None:
    done = quantize(plain, tmp_path / "out", "--format", "int4", "--group", "128")
    assert isinstance(done.exception, ValueError)
    told = r"layers\.0\.\S+ has (64|192) columns, which groups of 128 do not divide; groups of 32, 64 would"
    with pytest.raises(ValueError, match=told):
        raise done.exception
    assert not (tmp_path / "out").exists()


def test_other_weights_are_replaced_only_at_the_end(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(load_model(plain, "cpu"), tmp_path, GenerationConfig(), max_shard_bytes=500_000)
    shards = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(shards) > 4

    def fail(path: Path, values: dict) -> None:
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if not p.name.startswith(".")} == shards
        raise OSError("no space")

    with monkeypatch.context() as patch:
        patch.setattr("dgemma.checkpoints.save.write_json", fail)
        assert "no space" in str(quantize(plain, tmp_path, "--format", "fp8").exception)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == shards
    assert quantize(plain, tmp_path, "--format", "fp8").exit_code == 0
    assert {path.name for path in tmp_path.glob("model*")} == {"model.safetensors"}
    assert matrices(load_model(tmp_path, "cpu"))
