"""A small classifier of a state and the token after it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msd.backends.norms import RMSNorm


class Probe(nn.Module):
    """Predicts `outputs` logits from [feature; embedding], both [..., H], with two small layers.

    Its input is [h_i; emb(y_{i+1})]: a state of the target at i, or a draft state at deeper nodes, and the next token.
    A router predicts the modality of y_{i+2}; an ending probe predicts whether y_{i+2} ends the answer.
    """

    def __init__(self, hidden: int, outputs: int, eps: float, width: int = 64) -> None:
        super().__init__()
        self.norm = RMSNorm(2 * hidden, eps)
        self.hidden = nn.Linear(2 * hidden, width)
        self.out = nn.Linear(width, outputs)

    def forward(self, feature: Tensor, embedding: Tensor) -> Tensor:
        """feature, embedding [..., H] -> logits [..., outputs]."""
        return self.out(F.silu(self.hidden(self.norm(torch.cat([feature, embedding], -1)))))

    def add(self, x: Tensor, side: int) -> Tensor:
        """Computes what features (side 0) or embeddings (side 1) x [..., H] add to the small layer: [..., width + 1].

        The last column is their share of the mean square (plus ε) by which the norm divides.
        """
        scale, weight = self.norm.weight.chunk(2)[side], self.hidden.weight.chunk(2, 1)[side]
        square = (x.square().mean(-1, keepdim=True) + (self.norm.eps or 0.0)) / 2
        return torch.cat([F.linear(x * scale, weight), square], -1)

    def finish(self, added: Tensor) -> Tensor:
        """Computes the logits [..., outputs] from the sum of both sides [..., width + 1]."""
        product, square = added.split((added.shape[-1] - 1, 1), -1)
        out: Tensor = self.out(F.silu(torch.addcmul(self.hidden.bias, product, square.rsqrt())))
        return out
