"""What a checkpoint's JSON says, as frozen dataclasses: ModelConfig, VisionConfig, GenerationConfig."""

import json
import math
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

SLIDING, FULL = "sliding_attention", "full_attention"
BOTH_WAYS = {"vision": {SLIDING, FULL}, "vision_sliding": {SLIDING}, None: set[str]()}
"""use_bidirectional_attention: in which layers the tokens of an image see each other in both directions.

"vision": in all of them, as the released model is run by transformers' `generate`; "vision_sliding", a name of this
project: in the sliding ones and within the window, as Gemma 4 does; None: in none.
"""
BUDGETS = (70, 140, 280, 560, 1120)
"""Soft tokens an image may take: those the family was trained for."""
GAP_MARKER = "<fill>"
GAP_TOKENS = 64
"""Infill's longest gap, if nobody tells."""


@dataclass(frozen=True)
class Rope:
    """Rotary positions of one kind of layer; `type` is "default" (all pairs turn) or "proportional" (the first)."""

    theta: float
    type: str = "default"
    partial: float = 1.0

    def __post_init__(self) -> None:
        if self.type not in ("default", "proportional"):
            raise ValueError(f"rope_type {self.type!r} is not known; the family uses 'default' and 'proportional'")
        if self.type == "default" and self.partial != 1.0:
            raise ValueError(f"partial_rotary_factor {self.partial} needs rope_type 'proportional'")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        return cls(float(values["rope_theta"]), values["rope_type"], float(values.get("partial_rotary_factor", 1.0)))

    def to_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = {"rope_theta": self.theta, "rope_type": self.type}
        return values | ({"partial_rotary_factor": self.partial} if self.type == "proportional" else {})


@dataclass(frozen=True)
class VisionConfig:
    """The image tower of Gemma 4: sizes that name and shape its tensors, and the file's own values for the rest."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    patch_size: int
    position_embedding_size: int
    standardize: bool
    use_clipped_linears: bool
    pooling_kernel_size: int = 3
    rms_norm_eps: float = 1e-6
    rope_theta: float = 100.0
    source: dict[str, Any] = field(repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.head_dim % 4:
            raise ValueError(f"config.json: vision_config's head_dim must be a multiple of 4, not {self.head_dim}")
        kv_heads = self.source.get("num_key_value_heads", self.num_attention_heads)
        if kv_heads != self.num_attention_heads:
            raise ValueError(
                f"config.json: vision_config's num_key_value_heads must be its {self.num_attention_heads} attention "
                f"heads, not {kv_heads}"
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        own = [f for f in fields(cls) if f.name != "source"]
        missing = [f.name for f in own if f.default is MISSING and f.name not in values]
        if missing:
            raise ValueError(f"config.json: vision_config lacks {', '.join(missing)}")
        rope = values.get("rope_parameters") or {}
        found = {f.name: values[f.name] for f in own if f.name in values}
        if "rope_theta" in rope:
            found["rope_theta"] = float(rope["rope_theta"])
        return cls(**found, source=dict(values))


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the network, in the names of the released config.json (its text_config and top level, flat).

    `global_*` are those of the full-attention layers; `layer_types` has one of "sliding_attention" and
    "full_attention" a layer. Raises ValueError with the field and its value when a file makes no sense.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_experts: int
    top_k_experts: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_global_key_value_heads: int
    global_head_dim: int
    layer_types: tuple[str, ...]
    sliding_window: int
    canvas_length: int = 256
    max_position_embeddings: int = 262_144
    rms_norm_eps: float = 1e-6
    final_logit_softcapping: float = 30.0
    rope_sliding: Rope = Rope(10_000.0)
    rope_full: Rope = Rope(1_000_000.0, "proportional", 0.25)
    initializer_range: float = 0.02
    dtype: str = "bfloat16"
    pad_token_id: int = 0
    bos_token_id: int = 2
    eos_token_id: tuple[int, ...] = (1,)
    image_token_id: int | None = None
    boi_token_id: int | None = None
    eoi_token_id: int | None = None
    vision_soft_tokens_per_image: int = 280
    use_bidirectional_attention: str | None = "vision"
    vision: VisionConfig | None = None

    def __post_init__(self) -> None:
        positive = [f.name for f in fields(self) if f.type is int and not f.name.endswith("token_id")]
        for name in positive:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"config.json: {name} must be a whole number of at least 1, not {value!r}")
        unknown = set(self.layer_types) - {SLIDING, FULL}
        if unknown or not self.layer_types:
            raise ValueError(f"config.json: layer_types must name {SLIDING!r} or {FULL!r}, not {sorted(unknown)}")
        if self.layer_types[-1] != FULL:
            raise ValueError(f"config.json: the last of layer_types must be {FULL!r}, not {self.layer_types[-1]!r}")
        for heads in (self.num_key_value_heads, self.num_global_key_value_heads):
            if self.num_attention_heads % heads:
                raise ValueError(f"config.json: {self.num_attention_heads} query heads do not share {heads} kv heads")
        if self.top_k_experts > self.num_experts:
            raise ValueError(f"config.json: top_k_experts {self.top_k_experts} > num_experts {self.num_experts}")
        if self.use_bidirectional_attention not in BOTH_WAYS:
            told = f"{self.use_bidirectional_attention!r}, only {', '.join(map(repr, BOTH_WAYS))}"
            raise ValueError(f"config.json: use_bidirectional_attention cannot be {told}")
        if self.head_dim % 2 or self.global_head_dim % 2:
            raise ValueError(f"config.json: head sizes must be even, not {self.head_dim} and {self.global_head_dim}")

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layer_types)

    def kv_heads(self, layer: int) -> int:
        return self.num_key_value_heads if self.layer_types[layer] == SLIDING else self.num_global_key_value_heads

    def head_size(self, layer: int) -> int:
        return self.head_dim if self.layer_types[layer] == SLIDING else self.global_head_dim

    def rope(self, layer_type: str) -> Rope:
        return self.rope_sliding if layer_type == SLIDING else self.rope_full

    @property
    def prefix_window(self) -> int:
        """Cached tokens that a sliding layer can still reach: the window less the token itself."""
        return self.sliding_window - 1

    def first_reached(self, kind: str, past: int) -> int:
        """The first of `past` cached tokens that a layer of this kind can still reach."""
        return max(0, past - self.prefix_window) if kind == SLIDING else 0

    def cache_bytes_per_token(self, itemsize: int = 2, scale: int = 0) -> dict[str, int]:
        """Bytes one cached token takes in all layers of a kind: {"full_attention": …, "sliding_attention": …}.

        scale: bytes beside each head's key and each value.
        """
        sizes = {FULL: 0, SLIDING: 0}
        for layer, kind in enumerate(self.layer_types):
            sizes[kind] += 2 * self.kv_heads(layer) * (self.head_size(layer) * itemsize + scale)
        return sizes

    def cache_bytes(self, tokens: int, itemsize: int = 2, scale: int = 0) -> int:
        """Bytes of the pages of a row of `tokens`: full layers grow with it, sliding ones stop at the window."""
        sizes, page = self.cache_bytes_per_token(itemsize, scale), self.canvas_length
        pages = -(-tokens // page)
        dropped = self.first_reached(SLIDING, tokens) // page
        return page * (sizes[FULL] * pages + sizes[SLIDING] * (pages - dropped))

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        return cls.from_dict(read_json(path))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Reads both forms of config.json: the released one and the one with `per_layer_config`."""
        if values.get("model_type") != "diffusion_gemma":
            raise ValueError(f"config.json: model_type is {values.get('model_type')!r}, not 'diffusion_gemma'")
        text = dict(values.get("text_config") or {})
        for name, only in (("attention_bias", False), ("hidden_activation", "gelu_pytorch_tanh")):
            if text.get(name, only) != only:
                raise ValueError(f"config.json: {name} {text[name]!r} is not supported, only {only!r}")
        if values.get("tie_word_embeddings", True) is not True:
            raise ValueError("config.json: tie_word_embeddings false is not supported; the family ties them")
        if "layer_types" not in text:
            raise ValueError("config.json: text_config lacks layer_types")
        text |= _full_layers(text)
        rope = text.get("rope_parameters") or {}
        eos = values.get("eos_token_id", text.get("eos_token_id", 1))
        top = {name: values[name] for name in _TOP_LEVEL if values.get(name) is not None}
        own = {f.name for f in fields(cls)} - {"vision", "eos_token_id", "layer_types"} - top.keys()
        found: dict[str, Any] = {name: text[name] for name in own if text.get(name) is not None} | top
        found |= {key: Rope.from_dict(rope[kind]) for key, kind in _ROPES.items() if kind in rope}
        found["layer_types"] = tuple(text["layer_types"])
        found["use_bidirectional_attention"] = text.get("use_bidirectional_attention")
        found["eos_token_id"] = tuple(eos) if isinstance(eos, list | tuple) else (eos,)
        if values.get("vision_config"):
            found["vision"] = VisionConfig.from_dict(values["vision_config"])
        lacking = [f.name for f in fields(cls) if f.default is MISSING and f.name not in found]
        if lacking:
            raise ValueError(f"config.json: text_config lacks {', '.join(lacking)}")
        return cls(**found)

    def to_dict(self) -> dict[str, Any]:
        """The released form of config.json."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        text = {k: v for k, v in own.items() if k not in {*_TOP_LEVEL, *_ROPES, "vision", "eos_token_id"}}
        text |= {
            "layer_types": list(self.layer_types),
            "num_hidden_layers": self.num_hidden_layers,
            "eos_token_id": self.eos_token_id[0],
            "rope_parameters": {kind: self.rope(kind).to_dict() for kind in (FULL, SLIDING)},
            "model_type": "diffusion_gemma_text",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "hidden_activation": "gelu_pytorch_tanh",
            "initializer_range": self.initializer_range,
            "dtype": self.dtype,
            "tie_word_embeddings": True,
        }
        return {
            "architectures": ["DiffusionGemmaForBlockDiffusion"],
            "model_type": "diffusion_gemma",
            **{name: own[name] for name in _TOP_LEVEL},
            "eos_token_id": list(self.eos_token_id),
            "tie_word_embeddings": True,
            "text_config": text,
            "vision_config": dict(self.vision.source) if self.vision else None,
        }


_TOP_LEVEL = (
    "canvas_length",
    "dtype",
    "initializer_range",
    "image_token_id",
    "boi_token_id",
    "eoi_token_id",
    "vision_soft_tokens_per_image",
)
_ROPES = {"rope_sliding": SLIDING, "rope_full": FULL}


def _full_layers(text: dict[str, Any]) -> dict[str, Any]:
    """Head size and kv heads of the full layers, from whichever of the two forms the file uses."""
    if text.get("per_layer_config"):
        by_layer = {int(layer): override for layer, override in text["per_layer_config"].items()}
        full = [by_layer.get(i, {}) for i, kind in enumerate(text["layer_types"]) if kind == FULL]
        if any(layer != full[0] for layer in full):
            raise ValueError("config.json: per_layer_config differs between full-attention layers; it must not")
        override = full[0] if full else {}
    else:
        override = {
            "head_dim": text.get("global_head_dim"),
            "num_key_value_heads": text.get("num_global_key_value_heads"),
        }
    return {
        "global_head_dim": override.get("head_dim") or text.get("head_dim"),
        "num_global_key_value_heads": override.get("num_key_value_heads") or text.get("num_key_value_heads"),
    }


@dataclass(frozen=True)
class GenerationConfig:
    """How to decode, in the names of generation_config.json. Defaults are the release's.

    Raises ValueError naming the option, its value and the range that is allowed.
    """

    max_new_tokens: int = field(default=256, metadata={"help": "tokens to return at most"})
    max_denoising_steps: int = field(default=48, metadata={"help": "steps a canvas gets at most"})
    entropy_bound: float = field(default=0.1, metadata={"help": "nats that one step may accept beyond its first token"})
    t_min: float = field(default=0.4, metadata={"help": "temperature towards the last step"})
    t_max: float = field(default=0.8, metadata={"help": "temperature of the first step"})
    stability_threshold: int = field(default=1, metadata={"help": "earlier steps with the same best canvas to stop"})
    confidence_threshold: float = field(default=0.005, metadata={"help": "mean entropy in nats below which to stop"})
    greedy: bool = field(default=False, metadata={"help": "accept the likeliest tokens instead of drawn ones"})
    eos_token_id: tuple[int, ...] = field(default=(1,), metadata={"help": "tokens that end the text"})
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("max_denoising_steps", 1), ("stability_threshold", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")
        for name in ("entropy_bound", "t_min", "t_max", "confidence_threshold"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
                raise ValueError(f"{name} must be a number of at least 0, not {value!r}")
        if self.t_max <= 0 or self.t_min > self.t_max:
            raise ValueError(f"t_min must not exceed t_max, which must be above 0: {self.t_min}, {self.t_max}")

    def temperature(self, remaining: int) -> float:
        """Temperature with `remaining` steps left, counting this one: from t_max down towards t_min."""
        return self.t_min + (self.t_max - self.t_min) * remaining / self.max_denoising_steps

    def with_options(self, **options: Any) -> Self:
        known = [f.name for f in fields(self)]
        for name in options:
            if name not in known:
                raise ValueError(f"unknown option {name!r}; known: {', '.join(known)}")
        return replace(self, **options)

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        return cls.from_dict(read_json(path))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        sampler = values.get("sampler_config") or {}
        kind = sampler.get("_cls_name", "EntropyBoundSamplerConfig")
        if kind != "EntropyBoundSamplerConfig":
            raise ValueError(f"generation_config.json: sampler {kind!r} is not known, only EntropyBoundSamplerConfig")
        merged = {**values, **({"entropy_bound": sampler["entropy_bound"]} if "entropy_bound" in sampler else {})}
        eos = merged.get("eos_token_id")
        if eos is not None:
            merged["eos_token_id"] = (eos,) if isinstance(eos, int) else tuple(eos)
        names = {f.name for f in fields(cls)}
        return cls(**{name: value for name, value in merged.items() if name in names and value is not None})

    def to_dict(self) -> dict[str, Any]:
        left_out = {"entropy_bound"} if self.greedy else {"entropy_bound", "greedy"}  # the release knows no greedy
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}
        return values | {
            "eos_token_id": list(self.eos_token_id),
            "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": self.entropy_bound},
        }


@dataclass(frozen=True)
class MediaConfig:
    """How images and video are taken in. Raises ValueError naming the option and what it may be."""

    image_tokens: int = field(default=280, metadata={"help": "soft tokens an image may take: 70, 140, 280, 560, 1120"})
    frame_tokens: int = field(default=70, metadata={"help": "the same for a frame of a video"})
    video_frames: int = field(default=0, metadata={"help": "frames spread over a video; 0: one a second, up to 60 s"})

    def __post_init__(self) -> None:
        for name, most in (("image_tokens", BUDGETS[-1]), ("frame_tokens", BUDGETS[-1]), ("video_frames", 60)):
            value, least = getattr(self, name), 0 if name == "video_frames" else 1
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise ValueError(f"{name} must be a whole number in {least} … {most}, not {value!r}")

    @classmethod
    def of(cls, config: ModelConfig, **given: Any) -> Self:
        """What was given, else the model's own; soft tokens that it was made for."""
        own, names = config.vision_soft_tokens_per_image, [f.name for f in fields(cls)]
        if unknown := given.keys() - set(names):
            raise ValueError(f"unknown option {min(unknown)!r} of media; known: {', '.join(names)}")
        media = cls(**{"image_tokens": own, **given})
        for name in ("image_tokens", "frame_tokens"):
            known = sorted({*BUDGETS, own})
            if getattr(media, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, not {getattr(media, name)}")
        return media


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON object from a file; errors name the file."""
    path = Path(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path.name} must hold a JSON object, not {type(values).__name__}")
    return values
