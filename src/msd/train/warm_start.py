"""First guesses for a draft network out of its target: the output rows, the final norm and the last layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from msd.drafters.msd import MSDNetwork

PARTS = {  # of our layer: of a decoder layer of transformers
    "input_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    **{f"{p}_proj": f"self_attn.{p}_proj" for p in "qkvo"},
    **{f"{p}_proj": f"mlp.{p}_proj" for p in ("gate", "up", "down")},
}


@torch.no_grad()
def output_from(network: MSDNetwork, model: Any) -> None:
    """The target's output rows of the draft vocabulary, and its final norm: those rows expect states of its scale."""
    rows = model.get_output_embeddings().weight.detach()[network.heads.ids.to(model.device)]
    network.heads.head.weight.copy_(rows)
    norm = getattr(getattr(model.get_decoder(), "norm", None), "weight", None)
    if norm is not None:
        network.heads.norm.weight.copy_(norm)


@torch.no_grad()
def layers_from(network: MSDNetwork, model: Any) -> bool:
    """The trunk begins as the target's last layers; False, and nothing done, where their parts or sizes differ."""
    found: list[tuple[nn.Parameter, nn.Parameter]] = []
    theirs = getattr(model.get_decoder(), "layers", [])
    if len(theirs) < len(network.layers):
        return False
    for own, layer in zip(network.layers, theirs[len(theirs) - len(network.layers) :], strict=True):
        parts = dict(layer.named_parameters())
        for name, other in PARTS.items():
            mine = own.get_parameter(f"{name}.weight")
            given = parts.pop(f"{other}.weight", None)
            if given is None or given.shape != mine.shape:
                return False
            found.append((mine, given))
        if parts:  # biases or norms that our layer has no place for
            return False
    for mine, given in found:
        mine.copy_(given)
    return True
