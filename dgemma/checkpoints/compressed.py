"""Quantised matrices as compressed-tensors lays them out in files: names, parts, config. Experts go one by one."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dgemma.checkpoints.names import stored_name
from dgemma.kernels.numbers import NVFP4_GROUP
from dgemma.model.network import DiffusionGemma
from dgemma.quant.formats import W4A8, Float8, Int4, Int8, Nvfp4
from dgemma.quant.modules import QuantLinear, matrices
from dgemma.quant.packed import Packed
from dgemma.quant.quantize import EMBEDDING

PARTS = (r".*\.router\..*", r".*self_conditioning.*", r".*vision_tower.*", r".*embed_vision.*")
"""What is named as a whole where none of it is quantised; other tools hold the layers twice, under other names."""
FORMATS = {
    "fp8": "float-quantized",
    "int8": "int-quantized",
    "int4": "pack-quantized",
    "w4a8": "pack-quantized",
    "nvfp4": "nvfp4-pack-quantized",
}


def stored_tensors(name: str, matrix: Packed) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file that hold a matrix, by their released names; name: the network's own of the weight.

    ValueError for a format that the layout cannot express.
    """
    module = stored_name(name).removesuffix(".weight")
    whole = dict(matrix.named_buffers())
    if len(matrix.shape) == 2:
        parts = _parts(matrix, whole, module)
        yield from ((f"{module}.{part}", tensor) for part, tensor in parts.items())
        return
    stack, _, which = module.rpartition(".")
    rows = matrix.shape[1]
    halves = [("down_proj", slice(0, rows))]
    if which == "gate_up_proj":
        halves = [("gate_proj", slice(0, rows // 2)), ("up_proj", slice(rows // 2, rows))]
    for expert in range(matrix.shape[0]):
        for half, chosen in halves:
            own = f"{stack}.{expert}.{half}"
            buffers = {key: buffer[expert, chosen] for key, buffer in whole.items()}
            yield from ((f"{own}.{part}", tensor) for part, tensor in _parts(matrix, buffers, own).items())


def _parts(matrix: Packed, buffers: Mapping[str, Tensor], module: str) -> dict[str, Tensor]:
    match matrix:
        case Float8():
            return {"weight": buffers["codes"].view(torch.float8_e4m3fn), "weight_scale": buffers["scale"]}
        case Int8():
            return {"weight": buffers["codes"], "weight_scale": buffers["scale"]}
        case Int4() | W4A8():
            codes, scale = W4A8.to_int4(**buffers) if isinstance(matrix, W4A8) else (buffers["codes"], buffers["scale"])
            shape = torch.tensor([len(scale), matrix.shape[-1]])
            return {"weight_packed": codes.view(torch.int32), "weight_scale": scale, "weight_shape": shape}
        case Nvfp4(divide=True):
            parts = {"weight_packed": buffers["codes"], "weight_scale": buffers["scale"].view(torch.float8_e4m3fn)}
            return parts | {"weight_global_scale": buffers["factor"].flatten()[:1]}
    raise ValueError(f"{module} is {matrix.kind}, which the layout of compressed-tensors cannot hold bit for bit")


def quantization_config(model: DiffusionGemma) -> dict[str, Any]:
    """What config.json says of a network's quantised matrices. ValueError if they do not fit a config."""
    schemes: list[dict[str, Any]] = []
    targets: list[list[str]] = []
    for name, matrix in matrices(model).items():
        if matrix.kind == "dense":
            continue
        scheme = _scheme(matrix)
        if scheme not in schemes:
            schemes.append(scheme)
            targets.append([])
        of_scheme = targets[schemes.index(scheme)]
        of_scheme += [target for target in _targets(name) if target not in of_scheme]
    told = [target for of_scheme in targets for target in of_scheme]
    if len(set(told)) < len(told):
        raise ValueError(f"experts, or other layers, in several formats have no layout that can be written: {schemes}")
    if len(schemes) == 1 and EMBEDDING not in matrices(model):
        targets = [["Linear"]]
    groups = [{"targets": found, **scheme} for found, scheme in zip(targets, schemes, strict=True)]
    return {
        "quant_method": "compressed-tensors",
        "format": groups[0]["format"] if len(groups) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
        "ignore": ["lm_head", *_untouched(model)],
        "kv_cache_scheme": None,
    }


def _targets(name: str) -> list[str]:
    """Patterns of released module names that reach a matrix, and those of its kind in other layers."""
    if name == EMBEDDING:
        return [r"re:.*\.embed_tokens$"]
    if ".experts." in name:
        return [r"re:.*\.experts\.\d+\.(gate|up|down)_proj$"]
    return [r"re:.*\.self_attn\.[qkvo]_proj$" if ".self_attn." in name else r"re:.*\.mlp\.(gate|up|down)_proj$"]


def _scheme(matrix: Packed) -> dict[str, Any]:
    weights: dict[str, Any] = {"symmetric": True, "dynamic": False}
    inputs: dict[str, Any] | None = None
    each_token = {"symmetric": True, "dynamic": True, "strategy": "token", "num_bits": 8}
    match matrix:
        case Float8():
            weights |= {"num_bits": 8, "type": "float", "strategy": "channel"}
            inputs = each_token | {"type": "float"}
        case Int8():
            weights |= {"num_bits": 8, "type": "int", "strategy": "channel"}
            inputs = each_token | {"type": "int"} if matrix.activations else None
        case Int4() | W4A8():
            of_groups = matrix.get_buffer("multiple" if isinstance(matrix, W4A8) else "scale")
            group = matrix.shape[-1] // of_groups.shape[-1]
            inputs = each_token | {"type": "int"} if isinstance(matrix, W4A8) else None
            weights |= {"num_bits": 4, "type": "int", "strategy": "group", "group_size": group}
        case Nvfp4():
            weights |= {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": NVFP4_GROUP}
    return {"weights": weights, "input_activations": inputs, "format": FORMATS.get(matrix.kind)}


def _untouched(model: DiffusionGemma) -> list[str]:
    """The ignore list: whole parts of the network, and released names of what else is not quantised."""
    linear = nn.Linear | QuantLinear
    modules = (
        (stored_name(f"{name}.weight"), module) for name, module in model.named_modules() if isinstance(module, linear)
    )
    plain = {name.removesuffix(".weight"): isinstance(module, nn.Linear) for name, module in modules}
    parts = [part for part in PARTS if all(is_plain for name, is_plain in plain.items() if re.match(part, name))]
    rest = [name for name, is_plain in plain.items() if is_plain and not any(re.match(part, name) for part in parts)]
    return [*(f"re:{part}" for part in parts), *rest]
