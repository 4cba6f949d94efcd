"""Features of event frames as few tokens (EventGPT, Liu et al., 2024)."""

from __future__ import annotations

import torch
from torch import Tensor


def pooled(states: Tensor) -> Tensor:
    """[F, P, H] features of frames -> [F + P, H]: means over places (temporal), then means over frames (spatial)."""
    return torch.cat([states.mean(1), states.mean(0)])
