"""Acceptance rules: how probably a sampled candidate c ~ q is accepted, given p and θ. Elementwise over tokens.

All take p and q of one shape (any float dtype) and θ that broadcasts to it, and return probabilities of that shape. No
rule accepts a token with p = 0: what a processor forbids is never emitted, at no θ.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Theta = Tensor | float
Rule = Callable[[Tensor, Tensor, Theta], Tensor]


def ratio(p: Tensor, q: Tensor, theta: Theta = 1.0) -> Tensor:
    """α = min(1, p/q), the lossless rule (Leviathan et al. 2023, section 2.3); θ plays no part."""
    return (p / q.clamp_min(torch.finfo(q.dtype).tiny)).clamp_max(1.0)


def hard(p: Tensor, q: Tensor, theta: Theta) -> Tensor:
    """1 where α ≥ θ, else 0: the rule of `threshold`."""
    return ((p >= theta * q) & (p > 0)).to(p.dtype)


def soft(p: Tensor, q: Tensor, theta: Theta) -> Tensor:
    """1 where α ≥ θ, else α: the rule of `budget`, lossless at θ = 1."""
    return torch.maximum(hard(p, q, theta), ratio(p, q))
