"""Exact output distributions of the policies at one position, and their total variation distance from p.

p: [..., V] float64, the target's distribution. drafted: [..., V] bool, the tokens of the deterministic candidates.
q: [..., V], their draft probabilities (read at drafted tokens only). distributions: [..., K, V], the distributions of K
independent sampled candidates, in the order in which they are tried. present: [..., K] bool, False where a row lacks
the candidate. θ: a number or [..., 1]. The derivations are in docs/modality_verification.md. The results condition on
the deterministic candidates and on the draft distributions, not on the sampled tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from msd.verify.rejection import Rule, ThresholdLike, hard, normalise, residual, soft, without


def total_variation(a: Tensor, b: Tensor) -> Tensor:
    """TV(a, b) = ½ Σ |a - b|: [...] from two distributions [..., V]."""
    return (a - b).abs().sum(-1) / 2


def sampled_distribution(
    p: Tensor, distributions: Tensor | None, threshold: ThresholdLike, rule: Rule, present: Tensor | None = None
) -> Tensor:
    """Output distribution [..., V] of sampled candidates that are tried in order.

    out(r; q, ...) = q·a + (1 - Σ q·a)·out(norm(max(r - q, 0)); ...) with a = rule(r, q, θ), and out(r) = r after the
    last candidate. The residual after a rejection does not depend on which token was rejected.
    """
    r, out = p, torch.zeros_like(p)
    reached = torch.ones_like(p[..., :1])  # probability that all candidates so far were rejected
    for k in range(0 if distributions is None else distributions.shape[-2]):
        assert distributions is not None
        q = normalise(distributions[..., k, :].to(p.dtype))
        tried = torch.ones_like(reached) if present is None else present[..., k, None].to(p.dtype)
        accepted = q * rule(r, q, threshold) * tried
        out = out + reached * accepted
        reached = reached * (1 - accepted.sum(-1, keepdim=True)).clamp_min(0.0)
        r = torch.where(tried > 0, residual(r, q), r)
    return out + reached * r


def first_candidate(p: Tensor, drafted: Tensor, q: Tensor, threshold: ThresholdLike) -> tuple[Tensor, Tensor]:
    """The deterministic candidate that `threshold` accepts: (whether one is accepted [..., 1] bool, token [..., 1]).

    It is the candidate with the largest q among those with α ≥ θ; if several have that q, the one with the largest p.
    """
    passes = drafted & (hard(p, q, threshold) > 0)
    best = q.masked_fill(~passes, -1.0).amax(-1, keepdim=True)
    token = p.masked_fill(~(passes & (q == best)), -1.0).argmax(-1, keepdim=True)
    return passes.any(-1, keepdim=True), token


def threshold_distribution(
    p: Tensor,
    threshold: ThresholdLike,
    drafted: Tensor | None = None,
    q: Tensor | None = None,
    distributions: Tensor | None = None,
    present: Tensor | None = None,
) -> Tensor:
    """Output distribution [..., V] of `threshold`. Without q, each deterministic candidate has q = 1."""
    drafted = torch.zeros_like(p, dtype=torch.bool) if drafted is None else drafted
    accepts, token = first_candidate(p, drafted, torch.ones_like(p) if q is None else q, threshold)
    rest = sampled_distribution(without(p, drafted), distributions, threshold, hard, present)
    return torch.where(accepts, torch.zeros_like(p).scatter(-1, token, 1.0), rest)


def budget_distribution(
    p: Tensor,
    threshold: ThresholdLike,
    drafted: Tensor | None = None,
    distributions: Tensor | None = None,
    present: Tensor | None = None,
) -> Tensor:
    """Output distribution [..., V] of `budget`."""
    drafted = torch.zeros_like(p, dtype=torch.bool) if drafted is None else drafted
    p_drafted = p.masked_fill(~drafted, 0.0)
    P = p_drafted.sum(-1, keepdim=True)
    sampled = sampled_distribution(without(p, drafted), distributions, threshold, soft, present)
    otherwise = p_drafted + (1 - P).clamp_min(0.0) * sampled
    return torch.where((P > 0) & (threshold <= P), normalise(p_drafted), otherwise)
