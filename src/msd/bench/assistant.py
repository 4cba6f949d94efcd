"""An assistant for the library's assisted generation, for targets that nobody made one for.

The library takes any model of the same vocabulary; one that does not see refuses image tokens. So the assistant is the
target itself with the first third of its layers, sharing their weights, as in early-exit drafting without training for
it (LayerSkip, arXiv 2404.16710, does train for it, and drafts better).
"""

from __future__ import annotations

import copy
from itertools import chain

from torch import nn
from transformers import PreTrainedModel


def shallow(model: PreTrainedModel) -> PreTrainedModel:
    """The model with the first third of its decoder layers, at least one; tensors are shared.

    ValueError where the decoder is not a list of layers.
    """
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    assistant = copy.deepcopy(model, shared)
    decoder = assistant.get_decoder()
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"the decoder of {type(model).__name__} has no list of layers to shorten")
    kept = max(1, len(layers) // 3)
    decoder.layers = layers[:kept]
    for config in (assistant.config.get_text_config(decoder=True), decoder.config):
        config.num_hidden_layers = kept
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:kept]
    return assistant
