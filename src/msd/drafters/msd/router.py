"""What the target's newest state says of what comes, before the target has seen the token after it.

router    which modality the next drafted token will be: a head on [h_i; emb(y_{i+1})], the fused target state at i and
          the token after it, for the class of y_{i+2}. At deeper nodes the drafter's own state stands for h. The
          verifier asks it with the target's states.
ending    whether y_{i+2} ends the answer, which the target's pass finds out by itself: there is nothing to draft then.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Probe(nn.Module):
    """Two small layers from [feature; embedding], both [..., hidden], to `outputs` logits."""

    def __init__(self, hidden: int, outputs: int, eps: float, width: int = 64) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(2 * hidden, eps)
        self.hidden = nn.Linear(2 * hidden, width)
        self.out = nn.Linear(width, outputs)

    def forward(self, feature: Tensor, embedding: Tensor) -> Tensor:
        """feature, embedding [..., H] -> logits [..., outputs]."""
        out: Tensor = self.out(F.silu(self.hidden(self.norm(torch.cat([feature, embedding], -1)))))
        return out
