"""Whether other code for a model's modules says what their own says, and whether it is faster: a few short passes."""

from __future__ import annotations

import time

import torch
from torch import Tensor
from transformers import PreTrainedModel

from msd.backends.dispatch import Calls, redirected

SECONDS = 0.25  # of measuring, about


def difference(model: PreTrainedModel, calls: Calls) -> float:
    """The largest between the logits of both, as a share of the largest logit."""
    own, other = _logits(model, {}, 5), _logits(model, calls, 5)
    return float((own - other).abs().max() / own.abs().max().clamp_min(1e-30))


def faster(model: PreTrainedModel, calls: Calls) -> bool:
    """Whether passes over one row and over a tree of nine are faster so, both ways measured in turn."""
    ways: tuple[Calls, Calls] = ({}, calls)
    seconds: list[list[float]] = [[], []]
    begun = time.perf_counter()
    while len(seconds[0]) < 3 or time.perf_counter() - begun < SECONDS:
        for way, taken in zip(ways, seconds, strict=True):
            start = time.perf_counter()
            _logits(model, way, 1)
            _logits(model, way, 9)
            taken.append(time.perf_counter() - start)
    return min(seconds[1]) < min(seconds[0])


@torch.inference_mode()
def _logits(model: PreTrainedModel, calls: Calls, rows: int) -> Tensor:
    """Logits of a pass over a few arbitrary tokens: [1, rows, V]."""
    tokens = torch.arange(rows)[None] * 7 % model.config.get_text_config(decoder=True).vocab_size
    with redirected(calls), torch.autocast("cpu", enabled=False):
        embeddings = model.get_input_embeddings()(tokens.to(model.device))
        states = model.get_decoder()(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        out: Tensor = model.get_output_embeddings()(states)
    return out
