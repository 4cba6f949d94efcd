"""The terms of published losses. Draft logits are [..., V] over the draft vocabulary."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def soft_entropy(logits: Tensor, p: Tensor) -> Tensor:
    """Computes the cross entropy [...] of draft logits [..., V] to the target's distribution p."""
    return -(p * logits.float().log_softmax(-1)).sum(-1)


def hard_entropy(logits: Tensor, token: Tensor) -> Tensor:
    """Computes the cross entropy [...] of draft logits [..., V] to the answer's tokens [...]."""
    return -logits.float().log_softmax(-1).gather(-1, token[..., None]).squeeze(-1)


def distance(logits: Tensor, p: Tensor) -> Tensor:
    """Computes ‖p − q‖₁ = 2(1 − α) [...], α the acceptance rate; p sums to less than 1 over a reduced vocabulary."""
    return (p - logits.float().softmax(-1)).abs().sum(-1) + (1 - p.sum(-1)).clamp_min(0)


def regression(state: Tensor, truth: Tensor) -> Tensor:
    """Computes SmoothL1 [...] of states [..., H], mean over H."""
    return F.smooth_l1_loss(state.float(), truth.float(), reduction="none").mean(-1)


def ranking(logits: Tensor, p: Tensor, k: int = 10) -> Tensor:
    """Computes ListMLE [...] over the target's k likeliest tokens (ViSpec, released code).

    It is -log of the probability that they are drawn in the target's order, each by softmax over those not drawn yet.
    """
    order = p.topk(min(k, p.shape[-1]), -1).indices
    z = logits.float().gather(-1, order)
    return (z.flip(-1).logcumsumexp(-1).flip(-1) - z).sum(-1)
