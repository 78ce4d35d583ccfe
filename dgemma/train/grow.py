"""A deeper network that begins as the same function, so that what was learnt is not learnt again.

Source of the idea: Chen, Goodfellow and Shlens, Net2Net (arXiv 1511.05641); here added layers copy their neighbours.
"""

import dataclasses

import torch

from dgemma.model.network import DiffusionGemma


@torch.no_grad()
def grown(model: DiffusionGemma, layers: int) -> DiffusionGemma:
    """The network with so many layers, the added ones spread evenly behind those that they are copies of.

    They add nothing yet: the norms of what they add have zero weights, which learn first. ValueError for fewer layers.
    """
    config, own = model.config, len(model.layers)
    if layers < own:
        raise ValueError(f"layers = {layers}: the model has {own} already, and it can only grow")
    sources = [i * own // layers for i in range(layers)]
    config = dataclasses.replace(config, layer_types=tuple(config.layer_types[s] for s in sources))
    deeper = DiffusionGemma(config)
    deeper.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("layers.")}, strict=False)
    for i, source in enumerate(sources):
        deeper.layers[i].load_state_dict(model.layers[source].state_dict())
        if i and sources[i - 1] == source:
            for name in ("post_attention_layernorm", "post_feedforward_layernorm"):
                getattr(deeper.layers[i], name).weight.zero_()
            for name in ("layer_scalar", "encoder_layer_scalar"):
                getattr(deeper.layers[i], name).fill_(1)
    return deeper.to(model.device, model.dtype).eval()
