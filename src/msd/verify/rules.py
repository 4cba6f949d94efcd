"""Acceptance rules: how probably a sampled candidate c ~ q is accepted, given p and θ; and θ by modality.

All rules are elementwise over tokens. They take p and q of one shape (any float dtype) and θ that broadcasts to it, and
return probabilities of that shape. No rule accepts a token with p = 0: what a processor forbids is never emitted, at no
θ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from msd import modality
from msd.errors import UserError

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


def thresholds_by_id(overrules: Mapping[str, float]) -> dict[int, float]:
    """Modality id -> θ, for all registered modalities; UserError for an unknown name or a θ outside [0, 1]."""
    table = {m.id: m.threshold for m in modality.known()}
    for name, theta in overrules.items():
        kind = modality.get(name)
        if not 0.0 <= theta <= 1.0:
            raise UserError(f"threshold {theta} of modality '{name}' is outside [0, 1]")
        table[kind.id] = float(theta)
    return table


def checked_epsilon(epsilon: float) -> float:
    """ε in [0, 1], else UserError."""
    if not 0.0 <= epsilon <= 1.0:
        raise UserError(f"epsilon {epsilon} is outside [0, 1]; it bounds the mean total variation per token")
    return float(epsilon)
