"""θ by modality: the registry's numbers, some of them overruled."""

from __future__ import annotations

from collections.abc import Mapping

from msd import modality
from msd.errors import UserError


def thetas(overrules: Mapping[str, float]) -> dict[int, float]:
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
