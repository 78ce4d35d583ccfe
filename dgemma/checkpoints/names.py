"""The released files' tensor names beside the network's own."""

import re

_RULES = (
    (r"layers\.(\d+)\.encoder_layer_scalar", r"model.encoder.language_model.layers.\1.layer_scalar"),
    (r"vision\.embedding_projection\.(.*)", r"model.encoder.embed_vision.embedding_projection.\1"),
    (r"vision\.layers\.(.*)", r"model.encoder.vision_tower.encoder.layers.\1"),
    (r"vision\.(.*)", r"model.encoder.vision_tower.\1"),
    (r"(.*)", r"model.decoder.\1"),
)
_TWIN = re.compile(r"model\.encoder\.language_model\.(?!layers\.\d+\.layer_scalar$)(.*)")


def stored_name(name: str) -> str:
    """A name in `DiffusionGemma.state_dict()` to the one in the released files."""
    for pattern, stored in _RULES:
        if re.fullmatch(pattern, name):
            return re.sub(f"^{pattern}$", stored, name)
    raise AssertionError(name)


def released_name(stored: str) -> str:
    """The released name of any stored tensor: other tools also write the twins that the release ties and leaves out."""
    if stored == "lm_head.weight":
        return "model.decoder.embed_tokens.weight"
    twin = _TWIN.fullmatch(stored)
    return f"model.decoder.{twin[1]}" if twin else stored
