"""What a checkpoint's config says of its quantised weights: compressed-tensors' layouts, and modelopt's NVFP4.

Sources: the compressed-tensors package (quantization_config, names of parts) and NVIDIA's hf_quant_config.json.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from dgemma.config import read_json

MODELOPT_FILE = "hf_quant_config.json"
FLOATS = frozenset({"BF16", "F16", "F32"})
PACK = "pack-quantized"
NVFP4_PACK = "nvfp4-pack-quantized"
UNUSED = frozenset({"input_scale", "input_global_scale", "k_scale", "v_scale"})
"""Parts that only matter where activations are rounded to four bits or keys and values to eight; ours are not."""


@dataclass(frozen=True)
class Part:
    """A stored tensor of a quantised matrix: the buffer that it fills, and the dtypes that it may have."""

    buffer: str
    dtypes: frozenset[str]


@dataclass(frozen=True)
class Scheme:
    """How a group of matrices is quantised.

    kind: of `quant.formats.FORMATS`; group: columns that share a scale, 0 for a whole row; parts: by stored name;
    activations: rounded to int8 a token; divide: as of `Nvfp4`.
    """

    kind: str
    parts: Mapping[str, Part]
    group: int = 0
    activations: bool = False
    divide: bool = True
    targets: tuple[str, ...] = ("Linear",)

    @property
    def shape_part(self) -> str | None:
        return "weight_shape" if self.kind == "int4" else None


@dataclass(frozen=True)
class Layout:
    """The schemes of a checkpoint, and the modules that it says are left alone."""

    schemes: tuple[Scheme, ...]
    ignore: tuple[str, ...]

    def scheme(self, module: str) -> Scheme:
        """That of a quantised module. ValueError for one that the config leaves alone, or does not reach."""
        if pattern := next((p for p in self.ignore if _names(p, module)), None):
            raise ValueError(f"{module} is stored quantised, but the config's ignore list has {pattern!r}")
        if len(self.schemes) == 1:
            return self.schemes[0]
        for scheme in self.schemes:
            if any(target != "Linear" and _names(target, module) for target in scheme.targets):
                return scheme
        for scheme in self.schemes:
            if "Linear" in scheme.targets:
                return scheme
        raise ValueError(f"{module} is stored quantised, but is a target of none of the config's groups")


def read_layout(directory: Path, config: Mapping[str, Any]) -> Layout | None:
    """None where nothing is quantised. ValueError for what is not supported, by the name of the setting."""
    values = config.get("quantization_config") or config.get("compression_config")
    if not values and (directory / MODELOPT_FILE).is_file():
        found = read_json(directory / MODELOPT_FILE).get("quantization")
        values = {"quant_method": "modelopt", **found} if isinstance(found, dict) else None
    if not values:
        return None
    if not isinstance(values, dict):
        raise ValueError(f"{directory}: quantization_config is {values!r}, not an object")
    try:
        match values.get("quant_method"):
            case "compressed-tensors":
                return _compressed(values)
            case "modelopt" | "modelopt_fp4":
                return _modelopt(values)
            case other:
                raise ValueError(f"quant_method {other!r}; known are 'compressed-tensors' and 'modelopt'")
    except ValueError as error:
        raise ValueError(f"{directory} is quantised in a way that cannot be loaded: {error}") from None


def _compressed(values: Mapping[str, Any]) -> Layout:
    groups = values.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise ValueError("quantization_config has no config_groups")
    schemes = tuple(_scheme(name, group, values.get("format")) for name, group in groups.items())
    return Layout(schemes, tuple(values.get("ignore") or ()))


def _scheme(name: str, group: Mapping[str, Any], overall: str | None) -> Scheme:
    weights, inputs = group.get("weights"), group.get("input_activations") or {}
    if not isinstance(weights, dict):
        raise ValueError(f"{name} has no weights")
    bits, kind, strategy = weights.get("num_bits"), weights.get("type", "int"), weights.get("strategy")
    if not weights.get("symmetric", True):
        raise ValueError(f"{name}.weights.symmetric is false; weights with zero points are not supported")
    if weights.get("dynamic"):
        raise ValueError(f"{name}.weights.dynamic is true; weights must be quantised in the file")
    size = weights.get("group_size") or 0
    stored = group.get("format") or overall
    targets = tuple(group.get("targets") or ())
    rounded = inputs.get("type") == "int" and inputs.get("num_bits") == 8
    whole = strategy in ("channel", "tensor")
    match kind, bits:
        case ("float", 8) if whole and stored != PACK:
            return Scheme("fp8", _plain("F8_E4M3"), targets=targets)
        case ("int", 8) if whole and stored != PACK:
            return Scheme("int8", _plain("I8"), activations=rounded, targets=targets)
        case ("int", 4) if strategy in ("group", "channel") and stored in (None, PACK):
            grouped = size if strategy == "group" else 0
            if strategy == "group" and (size < 2 or size % 2):
                raise ValueError(f"{name}.weights.group_size is {size}; an even number of columns is expected")
            parts = {"weight_packed": Part("codes", frozenset({"I32"})), "weight_scale": Part("scale", FLOATS)}
            return Scheme("int4", parts, grouped, rounded, targets=targets)
        case ("float", 4) if size == 16 and stored in (None, NVFP4_PACK):
            return Scheme("nvfp4", _nvfp4("weight_packed", "weight_global_scale"), 16, targets=targets)
    told = ", ".join(f"{key} {value!r}" for key, value in (("num_bits", bits), ("type", kind), ("strategy", strategy)))
    raise ValueError(f"{name}: weights of {told}, group_size {size or None}, format {stored!r} are not supported")


def _modelopt(values: Mapping[str, Any]) -> Layout:
    algorithm, size = values.get("quant_algo"), values.get("group_size")
    for group in (values.get("config_groups") or {}).values():
        size = size or (group.get("weights") or {}).get("group_size")
    if algorithm != "NVFP4" or size not in (None, 16):
        raise ValueError(f"quant_algo {algorithm!r} with group_size {size}; of modelopt only NVFP4 with 16 is known")
    scheme = Scheme("nvfp4", _nvfp4("weight", "weight_scale_2"), 16, divide=False)
    return Layout((scheme,), tuple(values.get("ignore") or values.get("exclude_modules") or ()))


def _plain(codes: str) -> dict[str, Part]:
    return {"weight": Part("codes", frozenset({codes})), "weight_scale": Part("scale", FLOATS)}


def _nvfp4(codes: str, factor: str) -> dict[str, Part]:
    return {
        codes: Part("codes", frozenset({"U8"})),
        "weight_scale": Part("scale", frozenset({"F8_E4M3"})),
        factor: Part("factor", frozenset({"F32"})),
    }


def _names(pattern: str, module: str) -> bool:
    """A pattern of an ignore list or of targets: "re:" and an expression, a glob, a name, or a name's beginning."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return fnmatchcase(module, pattern) or module.startswith(pattern + ".")
