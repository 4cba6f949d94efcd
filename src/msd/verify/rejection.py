"""Acceptance rules: how probably a sampled candidate c ~ q is accepted, given p and θ; and θ by modality.

All rules are elementwise over tokens. They take p and q of one shape (any float dtype) and θ that broadcasts to it, and
return probabilities of that shape. No rule accepts a token with p = 0: what a processor forbids is never emitted, at no
θ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from msd.core import modality
from msd.core.sampling import Sampler
from msd.core.tree import Accepted, DraftTree, Scores
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
    for k in range(0 if tree.candidates is None else tree.candidates.child.shape[-1]):
        assert tree.candidates is not None
        trial = tree.candidates.child[each, node, k]
        trying = (child < 0) & (trial >= 0)
        active = trying.nonzero().squeeze(1).tolist()
        if not active:
            continue
        q = tree.candidates.distributions[active, tree.candidates.distribution[active, node[active], k]]
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


# (tree, node [R], law [R, V] scores, sampler, rows) -> (token [R] to emit below node, child [R] carrying it or -1)
Choose = Callable[[DraftTree, Tensor, Tensor, Sampler, list[int]], tuple[Tensor, Tensor]]


def walk(tree: DraftTree, scores: Scores, sampler: Sampler, choose: Choose) -> Accepted:
    """Walks down all rows together, one level at a time.

    Each token is emitted before the next node's law is asked for, so that processors see that node's own path.
    In lockstep (see `Sampler`) the walk ends for all rows where it ends for the first.
    """
    rows = sampler.alive
    accepted = Accepted([[] for _ in range(tree.batch)], [[] for _ in range(tree.batch)], padded=sampler.finished)
    if scores.modality is not None:
        accepted.modality = [[] for _ in range(tree.batch)]
    node = torch.zeros(len(rows), dtype=torch.long, device=tree.tokens.device)
    for _ in range(tree.height + 1):
        logits = sampler.logits(scores.logits[rows, node], rows)  # p at the reached nodes, [R, V]
        if scores.modality is not None and accepted.modality is not None:
            for row, kind in zip(rows, scores.modality[rows, node].tolist(), strict=True):
                accepted.modality[row].append(kind)
        token, child = choose(tree, node, logits, sampler, rows)
        if sampler.lockstep:
            token, child = sampler.padded(rows, token, child)
        tokens, below = token.tolist(), child.tolist()
        goes_on = sampler.emit_all(rows, tokens)
        going = [i for i, c in enumerate(below) if goes_on[i] and c >= 0]
        cut = sampler.lockstep and len(going) < len(rows)
        for i, row in enumerate(rows):
            accepted.tokens[row].append(tokens[i])
            # where the walk ends, a row's newest token is not committed, even if a draft carries it
            if below[i] >= 0 and not (cut and goes_on[i]):
                accepted.nodes[row].append(below[i])
        if cut or not going:
            break
        rows, node = [rows[i] for i in going], child[going]
    return accepted
