"""θ per modality for a divergence budget ε, solved on recorded positions for `budget`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from msd.core import modality
from msd.errors import UserError
from msd.verify.rejection import checked_epsilon, ratio

HALVINGS = 40


def calibrate(records: Mapping[str, tuple[Tensor, Tensor]], epsilon: float) -> dict[str, float]:
    """The least θ of each modality at which the mean total variation of `budget` over its records is at most ε.

    records: modality name -> (p, q). p: [n, V], the target's laws. q: [n, V], the laws that one candidate a position
    was sampled from; or bool, the deterministic candidates there. Bisection, since mean TV does not rise with θ and is
    0 at 1; the θ returned is always on the safe side. At ε = 0 it is 1. UserError for bad records.
    """
    checked_epsilon(epsilon)
    return {name: _solve(*_costs(name, p, q), epsilon) for name, (p, q) in records.items()}


def mean_divergence(p: Tensor, q: Tensor, theta: float) -> float:
    """Mean total variation of `budget` from p over records (p, q) as in `calibrate`."""
    alpha, cost = _costs("records", p, q)
    return _mean(alpha, cost, theta)


def _costs(name: str, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """(α, TV paid once θ ≤ α), both [n, V] for sampled candidates and [n, 1] for deterministic ones, float64."""
    if name != "records":
        modality.get(name)
    if p.dim() != 2 or p.shape != q.shape or not len(p):
        raise UserError(f"calibration records of '{name}': p {list(p.shape)} and q {list(q.shape)} must both be [n, V]")
    p = p.double()
    if q.dtype == torch.bool:
        mass = p.masked_fill(~q, 0.0).sum(-1, keepdim=True).clamp_max(1.0)
        return mass, torch.where(mass > 0, 1 - mass, 0.0)
    q = q.double()
    return ratio(p, q), torch.where(p > 0, (q - p).clamp_min(0.0), 0.0)


def _mean(alpha: Tensor, cost: Tensor, theta: float) -> float:
    return float(cost.masked_fill(alpha < theta, 0.0).sum() / len(cost))


def _solve(alpha: Tensor, cost: Tensor, epsilon: float) -> float:
    """Bisection between a θ that costs too much and one that does not."""
    if epsilon == 0.0:
        return 1.0  # not the least θ that cost nothing on these records, but the one that never does
    low, high = 0.0, 1.0
    if _mean(alpha, cost, low) <= epsilon:
        return low
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if _mean(alpha, cost, middle) <= epsilon:
            high = middle
        else:
            low = middle
    return high
