"""Which target something was measured on: its architecture and a hash of samples of its weights."""

from __future__ import annotations

import hashlib

import torch
from transformers import PreTrainedModel

_SAMPLES = 64  # elements of each weight


def fingerprint(model: PreTrainedModel) -> str:
    """Such as "llava-3f9a0c12b7d4": names, shapes and evenly spaced elements of all weights, at bfloat16 precision.

    The same for a checkpoint loaded in float32 and in bfloat16; another one after any training that moves the weights.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name}|{tuple(weight.shape)}|".encode())
        flat = weight.detach().reshape(-1)
        taken = flat[:: max(1, len(flat) // _SAMPLES)][:_SAMPLES].to("cpu", torch.bfloat16)
        digest.update(taken.contiguous().view(torch.uint8).numpy().tobytes())
    return f"{model.config.model_type}-{digest.hexdigest()[:12]}"
