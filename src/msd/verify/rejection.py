"""Sampled candidates, tried in order against what is left of p. docs/verification.md proves the lossless case."""

from __future__ import annotations

import torch
from torch import Tensor

from msd.sampling import Sampler
from msd.tree import DraftTree
from msd.verify.rules import Rule, Theta


def normalise(p: Tensor) -> Tensor:
    """p / Σp along the last axis."""
    return p / p.sum(-1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)


def left_after(r: Tensor, q: Tensor) -> Tensor:
    """norm(max(r - q, 0)), what is left of r [..., V] after a candidate from q [..., V] was rejected.

    Nothing is left when q and r agree but for rounding; the rejection then says nothing about them, and r stays.
    """
    left = (r - q).clamp_min(0.0)
    return normalise(torch.where(left.sum(-1, keepdim=True) > 0, left, r))


def without(p: Tensor, tokens: Tensor) -> Tensor:
    """p [..., V] without the tokens marked in [..., V] bool, normalised; p itself when it has no others."""
    rest = p.masked_fill(tokens, 0.0)
    return normalise(torch.where(rest.sum(-1, keepdim=True) > 0, rest, p))


def sampled_trials(
    tree: DraftTree, node: Tensor, residual: Tensor, sampler: Sampler, rows: list[int], rule: Rule, theta: Theta = 1.0
) -> tuple[Tensor, Tensor]:
    """Multi-candidate rejection at `node` [R] from the law `residual` [R, V]: (token [R], child [R] or -1).

    Each trial (child c, law q) is accepted with probability rule(residual(c), q(c), θ); on rejection the residual
    becomes norm(max(residual - q, 0)). After the last rejection the token is drawn from the residual. θ: [R, 1] or one
    number.
    """
    residual = residual.clone()
    child, token = torch.full_like(node, -1), torch.zeros_like(node)
    each = torch.arange(len(rows), device=node.device)
    for k in range(0 if tree.trials is None else tree.trials.child.shape[-1]):
        assert tree.trials is not None
        trial = tree.trials.child[each, node, k]
        trying = (child < 0) & (trial >= 0)
        active = trying.nonzero().squeeze(1).tolist()
        if not active:
            continue
        q = tree.trials.laws[active, tree.trials.law[active, node[active], k]]
        c = tree.tokens[active, trial[active]]
        p_c, q_c = residual[active].gather(1, c[:, None]).double(), q.gather(1, c[:, None]).double()
        u = sampler.uniform([rows[i] for i in active], node.device)
        accept = u < rule(p_c, q_c, theta[active] if isinstance(theta, Tensor) else theta)[:, 0]
        residual[active] = torch.where(accept[:, None], residual[active], left_after(residual[active], q))
        token[active] = torch.where(accept, c, token[active])
        child[active] = torch.where(accept, trial[active], -1)
    rejected = (child < 0).nonzero().squeeze(1).tolist()
    if rejected:
        token[rejected] = sampler.multinomial(residual[rejected], [rows[i] for i in rejected])
    return token, child
