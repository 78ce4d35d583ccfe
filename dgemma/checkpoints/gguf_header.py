"""What a GGUF file of DiffusionGemma says of itself: config, tokenizer keys, and where its tensors lie. Needs no torch.

The header is parsed here: the `gguf` package takes half a minute and more than a gigabyte for 262,144 tokens.
"""

import math
import re
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dgemma.checkpoints.headers import listed
from dgemma.config import FULL, SLIDING, GenerationConfig, ModelConfig, Rope
from dgemma.quant.ggml_types import SIZES

ARCHITECTURE = "diffusion-gemma"
ENDS = ("<turn|>", "<|tool_response>")
"""Tokens that end a turn or a tool call: the file's keys name only one end, so these are known by text."""

PLAIN = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_TYPES = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 12: "Q4_K", 13: "Q5_K"} | {
    **{14: "Q6_K", 30: "BF16"},
}
_SCALARS = {
    **{0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"},
}
_FLOAT32, _STRING, _ARRAY = 6, 8, 9
"""Metadata types by number: numbers in numpy's spelling, and the others."""

_EMBEDDING, ROPE = "token_embd.weight", "rope_freqs.weight"
_CAP = "final_logit_softcapping"

_TENSORS = {
    "embed_tokens.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "self_conditioning.pre_norm.weight": "self_cond_pre_norm.weight",
    "self_conditioning.gate_proj.weight": "self_cond_gate.weight",
    "self_conditioning.up_proj.weight": "self_cond_up.weight",
    "self_conditioning.down_proj.weight": "self_cond_down.weight",
}
_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "pre_feedforward_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "post_feedforward_layernorm_1.weight": "post_ffw_norm_1.weight",
    "router.proj.weight": "ffn_gate_inp.weight",
    "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale",
    "pre_feedforward_layernorm_2.weight": "pre_ffw_norm_2.weight",
    "experts.gate_up_proj": "ffn_gate_up_exps.weight",
    "experts.down_proj": "ffn_down_exps.weight",
    "post_feedforward_layernorm_2.weight": "post_ffw_norm_2.weight",
    "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
    "layer_scalar": "layer_output_scale.weight",
    "encoder_layer_scalar": "enc_layer_output_scale.weight",
}
_OWN = {stored: own for own, stored in (_TENSORS | _LAYER).items()}
_FIELDS = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_count": "num_experts",
    "expert_used_count": "top_k_experts",
    "attention.head_count": "num_attention_heads",
    "attention.key_length_swa": "head_dim",
    "attention.key_length": "global_head_dim",
    "attention.sliding_window": "sliding_window",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "context_length": "max_position_embeddings",
}
_NEEDED = (
    *_FIELDS,
    "block_count",
    "attention.head_count_kv",
    "attention.sliding_window_pattern",
    "rope.freq_base",
    "rope.freq_base_swa",
)
_SAME = {
    "attention.value_length": "attention.key_length",
    "attention.value_length_swa": "attention.key_length_swa",
    "rope.dimension_count": "attention.key_length",
    "rope.dimension_count_swa": "attention.key_length_swa",
}
_ONLY = {"attention.causal": False, "attention.shared_kv_layers": 0, "embedding_length_per_layer_input": 0}
_DECODING = {
    "eb_max_steps": "max_denoising_steps",
    "eb_t_min": "t_min",
    "eb_t_max": "t_max",
    "eb_entropy_bound": "entropy_bound",
    "eb_stability_threshold": "stability_threshold",
    "eb_confidence_threshold": "confidence_threshold",
}
_KNOWN = {f"{ARCHITECTURE}.{key}" for key in (*_NEEDED, *_SAME, *_ONLY, _CAP)} | {
    f"diffusion.{key}" for key in ("canvas_length", *_DECODING)
}


@dataclass(frozen=True)
class GgufTensor:
    """One tensor, mapped copy-on-write. `type` is ggml's name, `shape` torch's order ([E, out, in]).

    data: uint8 [..., out, bytes of a row] of a quantised type; else `shape` in float32, float16, or bfloat16's bits as
    uint16.
    """

    file: Path
    type: str
    shape: tuple[int, ...]
    data: np.ndarray


@dataclass(frozen=True)
class Gguf:
    """A file, or the files of a split one. tensors: by stored name, from `read_gguf` by the network's; keys: all
    metadata."""

    config: ModelConfig
    generation: GenerationConfig
    tensors: dict[str, GgufTensor]
    keys: dict[str, Any]


def read_gguf_header(path: str | Path) -> Gguf:
    """Reads what comes before the tensors, which stay on disk; of a split file any part, with the others beside it.

    Raises OSError for missing files; ValueError for damaged ones, another architecture, keys that make no sense, and
    tensors of an unknown type, by name. Unknown keys are warned of.
    """
    path = Path(path)
    keys, tensors = _read_parts(path)
    unknown = [k for k in keys if k.startswith((f"{ARCHITECTURE}.", "diffusion.")) and k not in _KNOWN]
    if unknown:
        warnings.warn(f"{path}: {listed(unknown, 'key')} not understood, and ignored", stacklevel=2)
    try:
        config = _config(keys, tensors)
        return Gguf(config, _generation(keys, config), tensors, keys)
    except ValueError as error:
        # What the two classes say of a value names the file that they usually come from.
        raise ValueError(f"{path}: {str(error).removeprefix('config.json: ')}") from None


def _read_parts(path: Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    """Metadata and tensors, by stored name, of a file or of all parts of a split one."""
    keys, tensors = _read_file(path)
    count = keys.get("split.count", 1)
    if count <= 1:
        return keys, tensors
    suffix = re.search(r"-\d{5}-of-\d{5}\.gguf$", path.name)
    if suffix is None:
        raise ValueError(f"{path}: one of {count} parts, but its name does not end like '-00001-of-{count:05}.gguf'")
    stem = path.name.removesuffix(suffix[0])
    parts = [path.with_name(f"{stem}-{part:05}-of-{count:05}.gguf") for part in range(1, count + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise FileNotFoundError(f"{path.parent} lacks {listed(missing, 'part')} of {stem}, which is split into {count}")
    read = [_read_file(part) for part in parts]
    tensors = {name: tensor for _, held in read for name, tensor in held.items()}
    if len(tensors) < sum(len(held) for _, held in read):
        raise ValueError(f"{path}: parts of it hold the same tensors twice")
    return read[0][0], tensors  # the first part alone has all of the keys


class _Cursor:
    """Takes one value after the other from the front of a file."""

    def __init__(self, data: memoryview):
        self.data, self.at = data, 0

    def bytes(self, count: int) -> memoryview:
        taken = self.data[self.at : self.at + count]
        if len(taken) < count:
            raise ValueError("it ends early")
        self.at += count
        return taken

    def numbers(self, dtype: str, count: int = 1) -> list[Any]:
        return np.frombuffer(self.bytes(count * np.dtype(dtype).itemsize), dtype).tolist()

    def int32(self) -> int:
        return struct.unpack("<I", self.bytes(4))[0]

    def int64(self) -> int:
        return struct.unpack("<Q", self.bytes(8))[0]

    def text(self) -> str:
        return str(self.bytes(self.int64()), "utf-8")

    def value(self) -> Any:
        """A metadata value behind its type: a number, a bool, a text, or a list of one of them."""
        kind = self.int32()
        if kind != _ARRAY:
            return self.values(kind, 1)[0]
        return self.values(self.int32(), self.int64())

    def values(self, kind: int, count: int) -> list[Any]:
        if kind == _STRING:
            return [self.text() for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(f"a value of type {kind}")
        found = self.numbers(_SCALARS[kind], count)
        # The shortest decimal that rounds to the same float32: 1e-06 again, not 9.99999997e-07.
        return [float(str(np.float32(found[0])))] if kind == _FLOAT32 and count == 1 else found

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape in torch's order, type and offset in bytes."""
        return self.text(), tuple(reversed(self.numbers("<u8", self.int32()))), self.int32(), self.int64()


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    """Metadata and tensors, by stored name, of one file."""
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ValueError(f"{path} is no GGUF file: it begins with {magic!r}, not b'GGUF'")
    data = np.memmap(path, dtype=np.uint8, mode="c")
    cursor = _Cursor(memoryview(data.data))
    try:
        cursor.bytes(len(magic))
        version = cursor.int32()
        if version not in (2, 3):
            raise ValueError(f"it is of version {version}, not 2 or 3")
        count, pairs = cursor.int64(), cursor.int64()
        keys = {cursor.text(): cursor.value() for _ in range(pairs)}
        entries = [cursor.tensor() for _ in range(count)]
    except ValueError as error:
        raise ValueError(f"{path} is damaged: its header cannot be read, {error}; download it again") from None
    architecture = keys.get("general.architecture")
    if architecture != ARCHITECTURE and not keys.get("split.no"):  # later parts of a split file do not say
        raise ValueError(f"{path}: its architecture is {architecture!r}, not {ARCHITECTURE!r}")
    alignment = keys.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"{path} is damaged: general.alignment is {alignment!r}; download it again")
    start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    problems = []
    for name, shape, type, offset in entries:
        try:
            tensors[name] = _map(path, data[start + offset :], type, shape)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise ValueError(f"{path} cannot be read: {listed(problems, 'tensor')}")
    if len(tensors) < len(entries):
        raise ValueError(f"{path} is damaged: it names a tensor twice")
    return keys, tensors


def _map(path: Path, data: np.ndarray, type: int, shape: tuple[int, ...]) -> GgufTensor:
    """The tensor of this type and shape at the front of `data`."""
    name = _TYPES.get(type)
    if name is None:
        raise ValueError(f"stored as ggml's type {type}; known are {', '.join(_TYPES.values())}")
    dtype, rows = np.dtype(PLAIN.get(name, "u1")), shape
    if name in SIZES:
        elements, size = SIZES[name]
        if not shape or shape[-1] % elements:
            raise ValueError(f"shape {list(shape)} does not divide into {name}'s blocks of {elements}")
        rows = *shape[:-1], shape[-1] // elements * size
    size = math.prod(rows) * dtype.itemsize
    if len(data) < size:
        raise ValueError(f"cut short, {len(data)} of {size} bytes; download it again")
    return GgufTensor(path, name, shape, data[:size].view(dtype).reshape(rows))


def _config(keys: dict[str, Any], stored: dict[str, GgufTensor]) -> ModelConfig:
    own = {k.removeprefix(f"{ARCHITECTURE}."): v for k, v in keys.items() if k.startswith(f"{ARCHITECTURE}.")}
    missing = [f"{ARCHITECTURE}.{key}" for key in _NEEDED if key not in own]
    missing += [key for key in ("diffusion.canvas_length", "tokenizer.ggml.tokens") if key not in keys]
    if missing:
        raise ValueError(f"it lacks {listed(missing, 'key')}")
    lacking = [name for name in (_EMBEDDING, ROPE) if name not in stored]
    if lacking:
        raise ValueError(f"it lacks {listed(lacking, 'tensor')}")
    for key, only in _ONLY.items():
        if own.get(key, only) != only:
            raise ValueError(f"{key} {own[key]!r} is not supported, only {only!r}")
    for key, other in _SAME.items():
        if own.get(key, own[other]) != own[other]:
            raise ValueError(f"{key} {own[key]!r} is not {other}, {own[other]!r}; that is not supported")
    kinds, heads = _layers(own)
    vocabulary, tokens = stored[_EMBEDDING].shape[0], len(keys["tokenizer.ggml.tokens"])
    if vocabulary != tokens:
        raise ValueError(f"{_EMBEDDING} has {vocabulary} rows for {tokens} tokens")
    factors = np.asarray(stored[ROPE].data)
    return ModelConfig(
        **{field: own[key] for key, field in _FIELDS.items()},
        vocab_size=vocabulary,
        num_key_value_heads=heads.get(SLIDING, heads[FULL]),
        num_global_key_value_heads=heads[FULL],
        layer_types=kinds,
        canvas_length=keys["diffusion.canvas_length"],
        rope_sliding=Rope(own["rope.freq_base_swa"]),
        rope_full=Rope(own["rope.freq_base"], "proportional", float((factors == 1).mean())),
        **({_CAP: own[_CAP]} if _CAP in own else {}),
        **_special(keys, vocabulary),
    )


def _layers(own: dict[str, Any]) -> tuple[tuple[str, ...], dict[str, int]]:
    """The kind of each layer, and the key/value heads of each kind."""
    count, sliding = own["block_count"], own["attention.sliding_window_pattern"]
    if not isinstance(sliding, list) or len(sliding) != count or all(sliding):
        raise ValueError(f"attention.sliding_window_pattern {sliding!r} is not a list of {count} booleans, some false")
    kinds = tuple(SLIDING if each else FULL for each in sliding)
    heads = own["attention.head_count_kv"]
    heads = heads if isinstance(heads, list) else [heads] * count
    by_kind = dict(zip(kinds, heads, strict=False))
    if len(heads) != count or heads != [by_kind[kind] for kind in kinds]:
        raise ValueError(f"attention.head_count_kv {heads} is not one number a layer, the same for a kind of layers")
    return kinds, by_kind


def _special(keys: dict[str, Any], vocabulary: int) -> dict[str, Any]:
    """The config's ids of special tokens, as far as the tokenizer's keys tell them."""
    known = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}
    ids = {field: keys[key] for name, field in known.items() if (key := f"tokenizer.ggml.{name}") in keys}
    beyond = [f"{field} {i}" for field, i in ids.items() if not 0 <= i < vocabulary]
    if beyond:
        raise ValueError(f"{', '.join(beyond)} is not one of {vocabulary} tokens")
    return ids | ({"eos_token_id": (ids["eos_token_id"],)} if "eos_token_id" in ids else {})


def _generation(keys: dict[str, Any], config: ModelConfig) -> GenerationConfig:
    told = {f: keys[key] for name, f in _DECODING.items() if (key := f"diffusion.{name}") in keys}
    tokens = keys["tokenizer.ggml.tokens"]
    ends = [*config.eos_token_id, *(tokens.index(end) for end in ENDS if end in tokens)]
    return GenerationConfig(**told, eos_token_id=tuple(dict.fromkeys(ends)), pad_token_id=config.pad_token_id)


def own_name(stored: str) -> str | None:
    """The name in the network's state_dict of a tensor of the file; None for one that is not the network's."""
    layer = re.fullmatch(r"blk\.(\d+)\.(.+)", stored)
    own = _OWN.get(layer[2] if layer else stored)
    return f"layers.{layer[1]}.{own}" if layer and own else own


def stored_name(name: str) -> str:
    """The file's name of a tensor in the network's state_dict."""
    layer = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    return f"blk.{layer[1]}.{_LAYER[layer[2]]}" if layer else _TENSORS[name]
