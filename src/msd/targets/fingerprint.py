"""Which target something was measured on: its architecture and a hash of samples of its weights."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from transformers import PreTrainedModel

_SAMPLES = 64  # elements of each weight


def fingerprint(model: PreTrainedModel) -> str:
    """Such as "llava-3f9a0c12b7d4": names, shapes and evenly spaced elements of all weights, at bfloat16 precision.

    The same for a checkpoint loaded in float32 and in bfloat16; another one after any training that moves the weights,
    and when they are quantised.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name}|{tuple(weight.shape)}|".encode())
        for part in _parts(weight.detach()):
            flat = part.reshape(-1)
            taken = flat[:: max(1, len(flat) // _SAMPLES)][:_SAMPLES].to("cpu", torch.bfloat16)
            digest.update(taken.contiguous().view(torch.uint8).numpy().tobytes())
    return f"{model.config.model_type}-{digest.hexdigest()[:12]}"


def _parts(weight: Tensor) -> list[Tensor]:
    """The weight, or the plain tensors (numbers, scales) that a quantised one is made of."""
    if not hasattr(weight, "__tensor_flatten__"):
        return [weight]
    names, _ = weight.__tensor_flatten__()
    return [part for name in names for part in _parts(getattr(weight, name))]
