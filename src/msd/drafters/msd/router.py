"""The router: which modality the next drafted token will be, before the target has seen its parent.

A head on [h_i; emb(y_{i+1})], the fused target state at i and the token after it, that predicts the class of y_{i+2}.
At deeper nodes the drafter's own state stands for h. The verifier asks it with the target's states.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msd.drafters.msd.config import MSDConfig


class Router(nn.Module):
    """Two small layers to one logit per modality of the drafter's configuration."""

    def __init__(self, config: MSDConfig, width: int = 64) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(2 * config.hidden, config.eps)
        self.hidden = nn.Linear(2 * config.hidden, width)
        self.out = nn.Linear(width, len(config.modalities))

    def forward(self, feature: Tensor, embedding: Tensor) -> Tensor:
        """feature, embedding [..., H] -> logits [..., M]."""
        out: Tensor = self.out(F.silu(self.hidden(self.norm(torch.cat([feature, embedding], -1)))))
        return out
