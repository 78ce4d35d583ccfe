"""Small checkpoints in the published quantised layouts, and the weights that they mean: what loading is held against.

Codes, packing and dequantised weights come from the compressed-tensors package, where it has them; modelopt's NVFP4 and
NVFP4 in float32 follow the formula of the format: e2m1 * (e4m3 * factor), in float32.
"""

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, preset_name_to_scheme
from safetensors.torch import save_file
from torch import Tensor

from dgemma.checkpoints.names import stored_name
from dgemma.config import ModelConfig
from dgemma.model.network import DiffusionGemma

Parts = dict[str, Tensor]

ALL = r"layers\.\d+\.(self_attn\.[qkvo]_proj|mlp|experts)\."
NO_MLP = r"layers\.\d+\.(self_attn\.[qkvo]_proj|experts)\."
EXPERTS = r"layers\.\d+\.experts\."
IGNORE = ["lm_head", "re:.*router.*", "re:.*embed_tokens.*", "re:.*vision.*", "re:.*self_conditioning.*"]
MODELOPT_IGNORE = [
    "lm_head",
    "*embed_vision*",
    "*mlp*",
    "*router*",
    "*self_attn*",
    "*self_conditioning*",
    "*vision_tower*",
]
FORMATS = {"fp8": "float-quantized", "int8": "int-quantized", "int4": "pack-quantized", "nvfp4": "nvfp4-pack-quantized"}
PRESETS = {"fp8": "FP8_DYNAMIC", "int8": "INT8", "int4": "W4A16", "nvfp4": "NVFP4"}
STEPS = {"fp8": 448.0, "int8": 127.5, "int4": 7.5}
"""The scale is the largest magnitude by this."""
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
WEIGHTS = frozenset({"weight", "weight_packed", "weight_scale"})
"""The parts that hold codes and scales."""


@dataclass(frozen=True)
class Case:
    """A layout. kind: of PRESETS, "modelopt" or "plain" (experts one by one in bfloat16); quantised: an expression for
    the network's names; strategy and group: as in compressed-tensors' configs; fused: experts as stacks; own_file:
    modelopt's config in a file of its own; sizes: hidden (and dense MLP), and an expert's."""

    kind: str
    quantised: str = ALL
    strategy: str = "channel"
    group: int | None = None
    scale: torch.dtype = torch.bfloat16
    fused: bool = False
    own_file: bool = False
    sizes: tuple[int, int] = (64, 32)

    @property
    def scheme(self) -> QuantizationScheme:
        scheme = preset_name_to_scheme(PRESETS[self.kind], ["Linear"]).model_copy(deep=True)
        if self.kind != "nvfp4":
            scheme.weights = scheme.weights.model_copy(update={"strategy": self.strategy, "group_size": self.group})
        return scheme


@dataclass
class Checkpoint:
    """What lies in a directory, to be changed by tests that damage it.

    plain: the weights that are not quantised, dense: those that are, by dtype, both by the network's names; parts: the
    stored names of each quantised weight.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    plain: dict[str, Tensor] = field(default_factory=dict)
    dense: dict[torch.dtype, dict[str, Tensor]] = field(default_factory=lambda: {torch.bfloat16: {}, torch.float32: {}})
    parts: dict[str, list[str]] = field(default_factory=dict)
    modelopt: dict[str, Any] | None = None

    def weights(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The whole network's, by its own names."""
        return {name: tensor.to(dtype) for name, tensor in self.plain.items()} | self.dense[dtype]

    def nbytes(self, name: str) -> int:
        """Codes and scales of a quantised weight in the file."""
        return sum(self.tensors[part].nbytes for part in self.parts[name] if part.rpartition(".")[2] in WEIGHTS)

    def write(self, directory: Path, shards: int = 1) -> Path:
        (directory / "config.json").write_text(json.dumps(self.config))
        if self.modelopt:
            (directory / "hf_quant_config.json").write_text(json.dumps(self.modelopt))
        names = sorted(self.tensors)
        files = {f"model-{i + 1:05}-of-{shards:05}.safetensors": names[i::shards] for i in range(shards)}
        if shards == 1:
            files = {"model.safetensors": names}
        else:
            index = {"weight_map": {name: file for file, held in files.items() for name in held}}
            (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        for file, held in files.items():
            save_file({name: self.tensors[name].contiguous() for name in held}, directory / file, {"format": "pt"})
        return directory


def network(base: ModelConfig, hidden: int, inner: int) -> DiffusionGemma:
    """Random weights in bfloat16, every tensor different."""
    sizes = {"hidden_size": hidden, "intermediate_size": hidden, "head_dim": hidden // 4, "global_head_dim": 32}
    model = DiffusionGemma(replace(base, moe_intermediate_size=inner, **sizes))
    generator = torch.Generator().manual_seed(0)
    for tensor in model.state_dict().values():
        centre, spread = (0.0, 0.2) if tensor.dim() > 1 else (1.0, 0.1)
        tensor.normal_(centre, spread, generator=generator)
    return model.bfloat16().eval()


def checkpoint(base: ModelConfig, case: Case) -> Checkpoint:
    """A random network in a layout."""
    model = network(base, *case.sizes)
    made = Checkpoint(model.config.to_dict() | {"dtype": "bfloat16"})
    _configure(made, case)
    for name, weight in model.state_dict().items():
        if not re.match(case.quantised, name):
            made.tensors[stored_name(name)] = made.plain[name] = weight
            continue
        stored = {module: compressed(matrix, case) for module, matrix in _matrices(name, weight, case.fused).items()}
        by_name = {f"{module}.{part}": tensor for module, parts in stored.items() for part, tensor in parts.items()}
        made.tensors |= by_name
        if case.kind == "plain":
            made.plain[name] = weight
            continue
        made.parts[name] = list(by_name)
        for dtype, dense in made.dense.items():
            dense[name] = torch.cat([means(parts, case, dtype) for parts in stored.values()]).view(weight.shape)
    return made


def _configure(made: Checkpoint, case: Case) -> None:
    match case.kind:
        case "plain":
            pass
        case "modelopt" if case.own_file:
            rules = {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16}
            made.modelopt = {"producer": {"name": "modelopt", "version": "0.45.0"}}
            made.modelopt["quantization"] = rules | {"exclude_modules": MODELOPT_IGNORE}
        case "modelopt":
            four = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
            made.config["quantization_config"] = {
                "config_groups": {"group_0": {"input_activations": four, "weights": four, "targets": ["Linear"]}},
                "ignore": MODELOPT_IGNORE,
                "quant_algo": "NVFP4",
                "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
                "producer": {"name": "modelopt", "version": "0.45.0"},
                "quant_method": "modelopt",
            }
        case kind:
            ignore = IGNORE + (["re:.*[.]mlp[.].*"] if case.quantised == NO_MLP else [])
            groups = {"group_0": case.scheme}
            config = QuantizationConfig(
                config_groups=groups, ignore=ignore, format=FORMATS[kind], quantization_status="compressed"
            )
            made.config["quantization_config"] = json.loads(config.model_dump_json())


def _matrices(name: str, weight: Tensor, fused: bool) -> dict[str, Tensor]:
    """Stored modules with their weights: experts one by one, their gate and up apart, unless `fused`."""
    module = stored_name(name).removesuffix(".weight")
    if weight.dim() == 2 or fused:
        return {module: weight}
    stack, _, which = module.rpartition(".")
    if which == "down_proj":
        return {f"{stack}.{e}.down_proj": matrix for e, matrix in enumerate(weight)}
    halves = ((e, half, part) for e, m in enumerate(weight) for half, part in zip(("gate", "up"), m.chunk(2)))  # noqa: B905
    return {f"{stack}.{e}.{half}_proj": part for e, half, part in halves}


def compressed(weight: Tensor, case: Case) -> Parts:
    """The parts of a matrix, or of a stack, as they are stored."""
    if case.kind == "plain":
        return {"weight": weight}
    if case.kind == "modelopt":
        parts = compressed(weight, Case("nvfp4"))
        factor = 1 / parts["weight_global_scale"][0]
        parts = {"weight": parts["weight_packed"], "weight_scale": parts["weight_scale"], "weight_scale_2": factor}
        return parts | {"input_scale": torch.tensor(0.0031)}
    group = 16 if case.kind == "nvfp4" else case.group
    top = weight.float().unflatten(-1, (-1, group or weight.shape[-1])).abs().amax(-1)
    if case.strategy == "tensor":
        top = top.amax().view(1)
    if case.kind == "nvfp4":
        factor = (448 * 6 / top.amax()).view(1)
        scale = (top / 6 * factor).to(torch.float8_e4m3fn).float()
        parts = {"weight_scale": scale, "weight_global_scale": factor, "input_global_scale": torch.tensor([312.5])}
    else:
        parts = {"weight_scale": (top / STEPS[case.kind]).to(case.scale)}
    return _compressor(case).compress(parts | {"weight": weight}, case.scheme)


def means(parts: Parts, case: Case, dtype: torch.dtype) -> Tensor:
    """The weight that parts stand for: computed in the wider of the scale's dtype and `dtype`, then rounded to it."""
    match case.kind:
        case "plain":
            return parts["weight"].to(dtype)
        case "modelopt":
            return _fp4(parts["weight"], parts["weight_scale"].float() * parts["weight_scale_2"]).to(dtype)
        case "nvfp4" if dtype != torch.bfloat16:  # the package gives no other
            return _fp4(parts["weight_packed"], parts["weight_scale"].float() / parts["weight_global_scale"]).to(dtype)
    scale = parts["weight_scale"]
    wide = scale if case.kind == "nvfp4" else scale.to(torch.promote_types(scale.dtype, dtype))
    return _compressor(case).decompress(parts | {"weight_scale": wide}, case.scheme)["weight"].to(dtype)


def _compressor(case: Case) -> type[BaseCompressor]:
    return BaseCompressor.get_value_from_registry(FORMATS[case.kind])


def _fp4(pairs: Tensor, scale: Tensor) -> Tensor:
    """float32 of two e2m1 codes a byte, the low nibble first; scale float32, one for 16 columns."""
    codes = torch.stack((pairs & 15, pairs >> 4), -1).flatten(-2).long()
    values = torch.where(codes < 8, E2M1[codes & 7], -E2M1[codes & 7])
    return (values.unflatten(-1, (-1, 16)) * scale[..., None]).flatten(-2)
