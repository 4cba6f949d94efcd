"""The frequencies of rotary position embeddings (Su et al. 2021): plain, scaled, and per M-RoPE axis."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

SCALINGS = ("linear", "llama3", "yarn")  # those that do not depend on the length of the text


def frequencies(dim: int, theta: float, rope: dict[str, Any] | None = None) -> tuple[Tensor, float]:
    """Returns (inverse frequencies [D/2], the factor of cosines and sines).

    rope: parameters of a scaling, which `transformers` computes.
    """
    if rope is None:
        return theta ** -(torch.arange(0, dim, 2).float() / dim), 1.0
    config = LlamaConfig(head_dim=dim, hidden_size=dim, num_attention_heads=1)
    config.rope_parameters = {"rope_theta": theta, **rope}
    with torch.device("cpu"):  # also where a network is made without storage, to compare shapes
        inverse, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
    return inverse, float(scale)


def axes(count: int, sections: tuple[int, ...], interleaved: bool) -> Tensor:
    """Returns the M-RoPE axis of each of `count` frequencies [count] int64.

    sections: frequencies per axis, consecutive (Qwen2-VL) or interleaved (Qwen3-VL); empty: one axis.
    """
    if interleaved and sections:
        return torch.tensor([i % 3 if i < 3 * sections[i % 3] else 0 for i in range(count)])
    return torch.tensor([axis for axis, n in enumerate(sections or (count,)) for _ in range(n)])
