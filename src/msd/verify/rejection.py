"""Acceptance rules, multi-candidate rejection sampling, and the walk of a verifier down a tree.

A rule gives the probability that a candidate c ~ q is accepted, from p, q and θ. Rules are elementwise over tokens: p
and q have one shape (any float dtype), θ broadcasts to it, and so do the returned probabilities. No rule accepts a
token with p = 0, so a token that a logits processor forbids is never emitted, at any θ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from msd.core import modality
from msd.core.sampling import Sampler
from msd.core.tree import Accepted, DraftTree, Scores
from msd.errors import UserError

ThresholdLike = Tensor | float
Rule = Callable[[Tensor, Tensor, ThresholdLike], Tensor]


def ratio(p: Tensor, q: Tensor, threshold: ThresholdLike = 1.0) -> Tensor:
    """α = min(1, p/q), the lossless rule (Leviathan et al. 2023, section 2.3); θ is ignored."""
    return (p / q.clamp_min(torch.finfo(q.dtype).tiny)).clamp_max(1.0)


def hard(p: Tensor, q: Tensor, threshold: ThresholdLike) -> Tensor:
    """1 where α ≥ θ, else 0: the rule of `threshold`."""
    return ((p >= threshold * q) & (p > 0)).to(p.dtype)


def soft(p: Tensor, q: Tensor, threshold: ThresholdLike) -> Tensor:
    """1 where α ≥ θ, else α: the rule of `budget`, lossless at θ = 1."""
    return torch.maximum(hard(p, q, threshold), ratio(p, q))


def thresholds_by_id(thresholds: Mapping[str, float]) -> dict[int, float]:
    """Modality id -> θ for all modalities: from `thresholds` by name, else the registry's default.

    Raises UserError for an unknown name or a θ outside [0, 1].
    """
    table = {m.id: m.threshold for m in modality.known()}
    for name, threshold in thresholds.items():
        kind = modality.get(name)
        if not 0.0 <= threshold <= 1.0:
            raise UserError(f"threshold {threshold} of modality '{name}' is outside [0, 1]")
        table[kind.id] = float(threshold)
    return table


def checked_epsilon(epsilon: float) -> float:
    """Returns ε; raises UserError unless it is in [0, 1]."""
    if not 0.0 <= epsilon <= 1.0:
        raise UserError(f"epsilon {epsilon} is outside [0, 1]; it bounds the mean total variation per token")
    return float(epsilon)


def normalise(p: Tensor) -> Tensor:
    """p / Σp along the last axis."""
    return p / p.sum(-1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)


def residual(p: Tensor, q: Tensor) -> Tensor:
    """The residual distribution norm(max(p - q, 0)), [..., V], after a candidate from q was rejected.

    If p and q differ only by rounding, max(p - q, 0) can be 0 at every token; then the residual is p itself.
    """
    rest = (p - q).clamp_min(0.0)
    return normalise(torch.where(rest.sum(-1, keepdim=True) > 0, rest, p))


def without(p: Tensor, tokens: Tensor) -> Tensor:
    """p [..., V] without the tokens marked in [..., V] bool, normalised; p itself if no other token has p > 0."""
    rest = p.masked_fill(tokens, 0.0)
    return normalise(torch.where(rest.sum(-1, keepdim=True) > 0, rest, p))


def try_sampled_candidates(
    tree: DraftTree,
    node: Tensor,
    p: Tensor,
    sampler: Sampler,
    rows: list[int],
    rule: Rule,
    threshold: ThresholdLike = 1.0,
) -> tuple[Tensor, Tensor]:
    """Multi-candidate rejection sampling below `node` [R] from p [R, V]: (token [R], child [R] or -1).

    A candidate c ~ q is accepted with probability rule(p(c), q(c), θ). After a rejection p becomes the residual
    distribution norm(max(p - q, 0)). After the last rejection the token is drawn from p. θ: [R, 1] or a number.
    """
    p = p.clone()
    child, token = torch.full_like(node, -1), torch.zeros_like(node)
    index = torch.arange(len(rows), device=node.device)
    for k in range(0 if tree.candidates is None else tree.candidates.child.shape[-1]):
        assert tree.candidates is not None
        candidate = tree.candidates.child[index, node, k]
        active = ((child < 0) & (candidate >= 0)).nonzero().squeeze(1).tolist()
        if not active:
            continue
        q = tree.candidates.distributions[active, tree.candidates.distribution[active, node[active], k]]
        c = tree.tokens[active, candidate[active]]
        p_c, q_c = p[active].gather(1, c[:, None]).double(), q.gather(1, c[:, None]).double()
        u = sampler.uniform([rows[i] for i in active], node.device)
        accept = u < rule(p_c, q_c, threshold[active] if isinstance(threshold, Tensor) else threshold)[:, 0]
        p[active] = torch.where(accept[:, None], p[active], residual(p[active], q))
        token[active] = torch.where(accept, c, token[active])
        child[active] = torch.where(accept, candidate[active], -1)
    rejected = (child < 0).nonzero().squeeze(1).tolist()
    if rejected:
        token[rejected] = sampler.multinomial(p[rejected], [rows[i] for i in rejected])
    return token, child


# (tree, node [R], processed logits [R, V], sampler, rows) -> (token [R] to emit below node, its node [R] or -1)
Choose = Callable[[DraftTree, Tensor, Tensor, Sampler, list[int]], tuple[Tensor, Tensor]]


def walk(tree: DraftTree, scores: Scores, sampler: Sampler, choose: Choose) -> Accepted:
    """Walks all rows down their trees, one level at a time; `choose` decides which token a node emits.

    Each token is emitted before the logits of the next node are processed, so that logits processors get the tokens on
    that node's path. In lockstep (see `Sampler`) the walk ends for all rows when it ends for one.
    """
    rows = sampler.alive
    accepted = Accepted([[] for _ in range(tree.batch)], [[] for _ in range(tree.batch)], padded=sampler.finished)
    if scores.modality is not None:
        accepted.modality = [[] for _ in range(tree.batch)]
    if sampler.keep_logits:
        accepted.logits = [[] for _ in range(tree.batch)]
    node = torch.zeros(len(rows), dtype=torch.long, device=tree.tokens.device)
    for _ in range(tree.height + 1):
        raw = scores.logits[rows, node]
        logits = sampler.logits(raw, rows)
        if scores.modality is not None and accepted.modality is not None:
            for row, kind in zip(rows, scores.modality[rows, node].tolist(), strict=True):
                accepted.modality[row].append(kind)
        if accepted.logits is not None:
            for i, row in enumerate(rows):
                accepted.logits[row].append((raw[i], logits[i]))
        token, child = choose(tree, node, logits, sampler, rows)
        if sampler.lockstep:
            token, child = sampler.pad_finished(rows, token, child)
        tokens, children = token.tolist(), child.tolist()
        alive = sampler.emit_all(rows, tokens)
        inside = [i for i, c in enumerate(children) if alive[i] and c >= 0]
        stop_all = sampler.lockstep and len(inside) < len(rows)
        for i, row in enumerate(rows):
            accepted.tokens[row].append(tokens[i])
            # the newest token is never committed to the cache, even if lockstep stops the walk at a drafted one
            if children[i] >= 0 and not (stop_all and alive[i]):
                accepted.nodes[row].append(children[i])
        if stop_all or not inside:
            break
        rows, node = [rows[i] for i in inside], child[inside]
    return accepted
