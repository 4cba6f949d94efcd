"""Exact output laws of the policies at one position, and their total variation from p.

p: [..., V] float64, the target's law. drafted: [..., V] bool, tokens of the deterministic candidates. q: [..., V], the
draft's probability of each of them (read at drafted tokens only). laws: [..., K, V], the laws of K independent sampled
candidates, tried in order; present: [..., K] bool, False where a row has no such candidate. θ: a number or [..., 1].
Derived in docs/modality_verification.md. Laws are given the tree for deterministic candidates and given the draft laws,
not the draws, for sampled ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from msd.verify.rejection import Rule, Theta, hard, left_after, normalise, soft, without


def total_variation(law: Tensor, p: Tensor) -> Tensor:
    """TV(law, p) = Σ max(law - p, 0) = ½ Σ |law - p|: [...] from two [..., V]."""
    return (law - p).abs().sum(-1) / 2


def sampled_law(p: Tensor, laws: Tensor | None, theta: Theta, rule: Rule, present: Tensor | None = None) -> Tensor:
    """Output law [..., V] of sampled candidates tried in order against p, by recursion.

    out(r; q, ...) = q·a + (1 - Σ q·a)·out(norm(max(r - q, 0)); ...), where a = rule(r, q, θ), and out(r) = r at last:
    what is left after a rejection does not depend on which token was rejected.
    """
    r, out = p, torch.zeros_like(p)
    reached = torch.ones_like(p[..., :1])
    for k in range(0 if laws is None else laws.shape[-2]):
        assert laws is not None
        q = normalise(laws[..., k, :].to(p.dtype))
        tried = torch.ones_like(reached) if present is None else present[..., k, None].to(p.dtype)
        accepted = q * rule(r, q, theta) * tried
        out = out + reached * accepted
        reached = reached * (1 - accepted.sum(-1, keepdim=True)).clamp_min(0.0)
        r = torch.where(tried > 0, left_after(r, q), r)
    return out + reached * r


def first_candidate(p: Tensor, drafted: Tensor, q: Tensor, theta: Theta) -> tuple[Tensor, Tensor]:
    """The deterministic candidate that `threshold` accepts: (whether there is one [..., 1] bool, its token [..., 1]).

    In descending order of q the first with α ≥ θ; among equal q the one with the largest p.
    """
    passes = drafted & (hard(p, q, theta) > 0)
    best = q.masked_fill(~passes, -1.0).amax(-1, keepdim=True)
    token = p.masked_fill(~(passes & (q == best)), -1.0).argmax(-1, keepdim=True)
    return passes.any(-1, keepdim=True), token


def threshold_law(
    p: Tensor,
    theta: Theta,
    drafted: Tensor | None = None,
    q: Tensor | None = None,
    laws: Tensor | None = None,
    present: Tensor | None = None,
) -> Tensor:
    """Output law [..., V] of `threshold`; without q, a deterministic candidate counts as a point mass, q = 1."""
    drafted = torch.zeros_like(p, dtype=torch.bool) if drafted is None else drafted
    found, token = first_candidate(p, drafted, torch.ones_like(p) if q is None else q, theta)
    rest = sampled_law(without(p, drafted), laws, theta, hard, present)
    return torch.where(found, torch.zeros_like(p).scatter(-1, token, 1.0), rest)


def budget_law(
    p: Tensor,
    theta: Theta,
    drafted: Tensor | None = None,
    laws: Tensor | None = None,
    present: Tensor | None = None,
) -> Tensor:
    """Output law [..., V] of `budget`."""
    drafted = torch.zeros_like(p, dtype=torch.bool) if drafted is None else drafted
    kept = p.masked_fill(~drafted, 0.0)
    mass = kept.sum(-1, keepdim=True)
    rest = (1 - mass).clamp_min(0.0) * sampled_law(without(p, drafted), laws, theta, soft, present)
    return torch.where((mass > 0) & (mass >= theta), normalise(kept), kept + rest)
