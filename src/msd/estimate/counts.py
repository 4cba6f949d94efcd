"""Counts the weights, keys, values and states of a decoder, from a model whose tensors have shapes but no numbers.

The model is built from its config on the "meta" device and reads two tokens, so that its cache shows what it keeps.
That needs no memory and no formula for each architecture.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForMultimodalLM, DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin
from transformers.modeling_layers import MtpModel

from msd.drafters.toolkit.mtp_network import declared, run_layer
from msd.errors import UserError
from msd.loading import FAULTS
from msd.targets import masks
from msd.targets.recurrent import STATELESS, mixer
from msd.targets.taps import text_decoder

TOKENS = 2  # of the pass that fills the cache


@dataclass(frozen=True)
class Counts:
    """Numbers of a decoder; weights are those of matrices, without norms and biases.

    layers: all; recurrent: those with a state. dense: weights of all layers without routed experts. mixers: those of
    the recurrent layers' mixers, a part of `dense`. experts: weights of all routed experts that text reads; active:
    those that one token uses. kept: numbers in the cache for one token. read: those that a pass reads for it, more
    where layers share keys. attention: FLOPs for one row and one key. states: numbers of one sequence's states.
    """

    layers: int
    dense: int
    kept: int
    read: int
    attention: int
    experts: int = 0
    active: int = 0
    recurrent: int = 0
    mixers: int = 0
    states: int = 0

    def share(self, parts: int) -> Counts:
        """The counts of one of `parts` equal parts."""
        return Counts(*(getattr(self, f.name) // parts for f in fields(self)))

    def weights(self, tokens: int) -> float:
        """Weights that a pass over `tokens` tokens reads, if each token chooses its experts at random."""
        unused = (1 - self.active / self.experts) ** tokens if self.experts else 0.0
        return self.dense + self.experts * (1 - unused)


def counted(name: str, config: Any) -> tuple[Counts, int, Counts | None]:
    """Returns (the decoder's counts, the weights of the whole model, the counts of multi-token-prediction layers).

    UserError if `config` cannot be built.
    """
    text = config.get_text_config(decoder=True)
    try:
        with torch.device("meta"), torch.no_grad():
            model = AutoModelForMultimodalLM.from_config(config)
            layers = list(text_decoder(model).layers[: text.num_hidden_layers])
            for _, block in [found for layer in layers for found in _blocks(layer)]:
                block.experts.forward = _no_expert
            cache = DynamicCache(config=text)
            tokens = torch.zeros(1, TOKENS, dtype=torch.long)
            model.get_decoder()(input_ids=tokens, past_key_values=cache, use_cache=True)
            mtp = _mtp(model, tokens)
    except (*FAULTS, NotImplementedError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"the model of '{name}' cannot be built from its config ({reason})") from error
    return _counts(layers, cache, text), sum(p.numel() for p in model.parameters()), mtp


def _mtp(model: PreTrainedModel, tokens: torch.Tensor) -> Counts | None:
    """The counts of a model's multi-token-prediction layers, from a pass of each; None if its config has none."""
    with declared(model):
        number = getattr(model.config.get_text_config(decoder=True), "num_mtp_layers", None)
        if not number:
            return None
        network = MtpModel(model, number)
    cache, layers = DynamicCache(), list(network.layers)
    for _, block in [found for layer in layers for found in _blocks(layer)]:
        block.experts.forward = _no_expert
    windows, tables = masks.attention_windows(network.config), masks.row_tables([0], TOKENS, tokens.device)
    states = torch.zeros(1, TOKENS, network.config.hidden_size)
    positions = torch.zeros(1, 1, TOKENS, dtype=torch.long)
    for k in range(number):
        states = run_layer(network, k, tokens, states, positions, tables, windows, cache)
    return _counts(layers, cache, network.config)


def _counts(layers: list[nn.Module], cache: DynamicCache, text: Any) -> Counts:
    """The counts of decoder layers whose cache holds `TOKENS` tokens."""
    keys = [held for held in cache.layers if getattr(held, "keys", None) is not None]
    recurrent = [i for i, held in enumerate(cache.layers) if isinstance(held, LinearAttentionCacheLayerMixin)]
    states = [state for i in recurrent for state in _states(cache.layers[i])]
    kinds = getattr(text, "layer_types", None) or [None] * len(layers)
    attending = sum(kind not in STATELESS for kind in kinds[: len(layers)]) - len(recurrent)
    kept = [(held.keys.numel() + held.values.numel()) // TOKENS for held in keys]
    heads = text.to_dict()[
        "num_attention_heads"
    ]  # where it differs from layer to layer, as in Step 3.7, the common one
    work = [2 * heads * n // held.keys.shape[1] for n, held in zip(kept, keys, strict=True)]
    experts, active = (sum(found) for found in zip((0, 0), *(_routed(layer) for layer in layers), strict=True))
    return Counts(
        len(layers), _matrices(layers) - sum(map(_all_experts, layers)), sum(kept), _shared(kept, attending),
        _shared(work, attending), experts, active, len(recurrent), _matrices([mixer(layers[i]) for i in recurrent]),
        sum(state.numel() for state in states),
    )  # fmt: skip


def _shared(numbers: list[int], attending: int) -> int:
    """The sum over `attending` layers, of which only some have numbers of their own."""
    return round(sum(numbers) * attending / len(numbers)) if numbers else 0


def _states(held: Any) -> list[torch.Tensor]:
    """The states in a cache layer of the library."""
    return [state for state in (*held.conv_states.values(), *held.recurrent_states.values()) if state is not None]


def _matrices(modules: list[nn.Module]) -> int:
    """The number of weights in matrices."""
    return sum(p.numel() for module in modules for p in module.parameters() if p.dim() > 1)


def _blocks(layer: nn.Module) -> list[tuple[str, Any]]:
    """(name, module) of the blocks of a layer that route tokens to experts."""
    return [found for found in layer.named_modules() if isinstance(getattr(found[1], "experts", None), nn.Module)]


def _no_expert(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """In place of experts: which of them run depends on numbers."""
    return torch.zeros_like(hidden_states)


def _all_experts(layer: nn.Module) -> int:
    """The weights of all routed experts of a layer."""
    return sum(_matrices([block.experts]) for _, block in _blocks(layer))


def _routed(layer: nn.Module) -> tuple[int, int]:
    """(all, active) weights of a layer's routed experts, without those that only images use, as in ERNIE 4.5 VL."""
    everything = active = 0
    for name, block in _blocks(layer):
        if not name.endswith("vision_moe"):
            chosen = next(part.top_k for part in block.modules() if isinstance(getattr(part, "top_k", None), int))
            weights = _matrices([block.experts])
            everything += weights
            active += weights * chosen // next(block.experts.parameters()).shape[0]
    return everything, active
