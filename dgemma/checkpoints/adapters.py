"""LoRA adapters as files: adapter_config.json and adapter_model.safetensors, in the names and the layout of PEFT.

PEFT adapts transformers' encoder and decoder each by itself, though their weights are tied. So a file holds a layer's
adapters twice, with the same values; here the stack is one, and they are applied once.
PEFT keeps the E experts' A as [E * rank, in] and their B as [out, rank * E], where the expert varies fastest.
"""

import re
from collections import defaultdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dgemma.checkpoints.headers import listed, read_header
from dgemma.checkpoints.names import released_name, stored_name
from dgemma.checkpoints.save import replacing, write_json, write_tensors
from dgemma.checkpoints.source import ADAPTER
from dgemma.config import read_json
from dgemma.model.lora import PARTS, adapt, adapter_state, pairs, require_plain, shapes
from dgemma.model.network import DiffusionGemma

WEIGHTS = "adapter_model.safetensors"
# Of two adapted parameters of one module, PEFT wraps the second around the first.
_NESTED = {"gate_up_proj": ".base_layer"}
_KEY = re.compile(r"base_model\.model\.(.+?)((?<=\.experts)\.base_layer)?\.lora_([AB])\.weight")
_ALLOWED = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    # The other starts change the base's weights too.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}
_REFUSED = (
    *("rank_pattern", "alpha_pattern", "modules_to_save", "use_dora", "lora_bias", "use_qalora", "use_bdlora"),
    *("layer_replication", "trainable_token_indices", "alora_invocation_tokens"),
    *("arrow_config", "kasa_config", "monteclora_config"),
)


def save_adapter(model: DiffusionGemma, directory: str | Path, base: str) -> None:
    """Writes the network's adapter; `base` is the model that it changes, as `dgemma.load` takes it.

    A save that fails, with OSError, leaves what was there.
    """
    tensors: dict[str, Tensor] = {}
    targets: dict[str, list[str]] = {"target_modules": [], "target_parameters": []}
    rank, scale = 0, 0.0
    for name, pair in pairs(model).items():
        rank, scale = pair.A.shape[-2], pair.scale
        a, b, stacked = pair.A.detach(), pair.B.detach(), pair.A.dim() == 3
        if stacked:
            a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
        module, _, weight = name.rpartition(".")
        for twin in _twins(module):
            targets["target_parameters" if stacked else "target_modules"].append(
                f"{twin}.{weight}" if stacked else twin
            )
            key = f"base_model.model.{twin}{_NESTED.get(weight, '')}"
            # Copies, for tensors in one file may not share memory.
            tensors |= {f"{key}.lora_A.weight": a.clone(), f"{key}.lora_B.weight": b.clone()}
    if not tensors:
        raise ValueError("the model has no adapter to save; add_lora puts one in")
    config = {"peft_type": "LORA", "base_model_name_or_path": base, "r": rank, "lora_alpha": scale * rank}
    config |= {"lora_dropout": 0.0, "bias": "none", "inference_mode": True, **targets}
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with replacing(directory) as new:
        write_tensors(new(WEIGHTS), tensors)
        write_json(new(ADAPTER), config)


def load_adapter(model: DiffusionGemma, directory: str | Path) -> None:
    """Puts the adapter of a directory into the network, ready to train or to merge; everything else is frozen.

    Where a file holds only one of a layer's two copies, that one counts. Raises OSError for missing files; ValueError
    for kinds of adapter that are not supported, for copies that differ, and for tensors that do not fit, by name.
    """
    require_plain(model)
    directory = Path(directory)
    for file in (ADAPTER, WEIGHTS):
        if not (directory / file).is_file():
            raise FileNotFoundError(f"{directory} holds no {file}: it is not the directory of an adapter")
    rank, scale = _rank_and_scale(directory / ADAPTER)
    state = _fitted(model, directory / WEIGHTS, rank)
    adapt(model, dict.fromkeys(re.sub(r"\.\w+\.[AB]$", "", name) for name in state), rank, scale)
    own = adapter_state(model)
    for name, tensor in state.items():
        own[name].copy_(tensor)


def _fitted(model: DiffusionGemma, path: Path, rank: int) -> dict[str, Tensor]:
    """The file's tensors in the names and shapes of `adapter_state`."""
    read_header(path)
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    any_part = "|".join(PARTS.values())
    known = {stored_name(name): name for name, _ in model.named_modules() if re.fullmatch(any_part, name)}
    halves: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    problems: dict[str, list[str]] = defaultdict(list)
    for key in sorted(tensors):
        match = _KEY.fullmatch(key)
        module = known.get(released_name(match[1])) if match else None
        if match is None or module is None:
            problems["unknown"].append(key)
            continue
        twin = halves[module, match[2] or ""].setdefault(match[3], key)
        if not torch.equal(tensors[twin], tensors[key]):
            raise ValueError(f"{path}: {twin} differs from {key}, which adapts the same weight; they must be equal")
    state: dict[str, Tensor] = {}
    for (module, _), keys in halves.items():
        key = next(iter(keys.values()))
        if len(keys) < 2:
            problems["without its other half"].append(key)
            continue
        a, b = tensors[keys["A"]], tensors[keys["B"]]
        fits = [
            (f"{module}.{weight}", stack)
            for weight, (*stack, outputs, inputs) in shapes(model.get_submodule(module)).items()
            if a.shape == (rank * (stack or [1])[0], inputs) and b.shape == (outputs, rank * (stack or [1])[0])
        ]
        if not fits or f"{fits[0][0]}.A" in state:
            problems[f"wrongly shaped for rank {rank}"].append(f"{key} {list(a.shape)} with B {list(b.shape)}")
            continue
        name, stack = fits[0]
        if stack:
            a, b = a.unflatten(0, (*stack, rank)), b.unflatten(1, (rank, *stack)).permute(2, 0, 1)
        state |= {f"{name}.A": a, f"{name}.B": b}
    if problems:
        said = "; ".join(f"{what}: {listed(found, 'tensor')}" for what, found in problems.items())
        raise ValueError(f"{path} does not fit the model: {said}")
    if not state:
        raise ValueError(f"{path} holds no tensors")
    return state


def _rank_and_scale(path: Path) -> tuple[int, float]:
    config = read_json(path)
    wrong = [name for name, allowed in _ALLOWED.items() if config.get(name) not in allowed]
    for name in (*wrong, *(name for name in _REFUSED if config.get(name))):
        raise ValueError(f"{path}: {name} {config.get(name)!r} is not supported; plain LoRA is")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise ValueError(f"{path}: r and lora_alpha must be numbers, r at least 1, not {rank!r} and {alpha!r}")
    return rank, alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _twins(module: str) -> list[str]:
    """Where transformers has a module: the decoder, and for layers the encoder too."""
    return [stored_name(module)] + [f"model.encoder.language_model.{module}"] * module.startswith("layers.")
