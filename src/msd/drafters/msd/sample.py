"""Sampled candidates: the subtrees' laws drawn from instead of ranked.

The root has draws for each active modality by its share of the budget; below it every node has one. How many there are
follows from the router and the budget alone, never from what was drawn, as exact verification needs
(docs/verification.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from msd.drafters.msd.config import Shape
from msd.drafters.msd.grow import Subtrees
from msd.drafters.msd.heads import Heads
from msd.drafters.msd.laws import Laws, Levels
from msd.plan import Budget
from msd.sampling import Sampler
from msd.tree import DraftTree, Trials

BRANCHES = 3  # chains at the root


def draw(
    levels: Levels,
    heads: Heads,
    subtrees: Subtrees,
    modality_ids: Tensor,
    newest: Tensor,
    budget: Budget,
    sampler: Sampler,
    shape: Shape,
) -> DraftTree:
    """Chains of draws, `BRANCHES` at most, as deep as `shape`, the budget and the row's own limit allow."""
    B = len(newest)
    device = newest.device
    count = min(BRANCHES if budget.width is None else budget.width, budget.nodes)
    share = subtrees.budget.double() / subtrees.budget.sum(-1, keepdim=True)
    source = _assign(share, count)  # [B, count] subtree of each chain
    depth = min(max(budget.depth), shape.depth, budget.nodes // count)
    first = levels.root(subtrees.weights)
    laws = [_full(first, heads, sampler)]  # [B, M, V], then [B, count, V] a level
    tokens = [_draw(laws[0].gather(1, source[..., None].expand(-1, -1, laws[0].shape[-1])), sampler, budget.depth, 1)]
    kinds = [modality_ids[first.weights.argmax(-1)].gather(1, source)]
    above = source
    for level in range(2, depth + 1):
        below = levels.below(tokens[-1], above)
        above = torch.arange(count, device=device).expand(B, -1)
        laws.append(_full(below, heads, sampler))
        tokens.append(_draw(laws[-1], sampler, budget.depth, level))
        kinds.append(modality_ids[below.weights.argmax(-1)])
    return _tree(newest, tokens, kinds, laws, source, budget.depth)


def _assign(share: Tensor, count: int) -> Tensor:
    """`count` draws dealt to subtrees in proportion to `share` [B, M], the likeliest first: [B, count]."""
    given = torch.zeros_like(share)
    dealt = []
    for _ in range(count):
        turn = (share / (given + 1)).argmax(-1)  # highest averages (Jefferson)
        given.scatter_add_(1, turn[:, None], torch.ones_like(share[:, :1]))
        dealt.append(turn)
    return torch.stack(dealt, 1)


def _full(laws: Laws, heads: Heads, sampler: Sampler) -> Tensor:
    """Draft laws [B, F, V] over the target's ids, through the request's processors where these look at scores alone."""
    B, F, _ = laws.logits.shape
    scores = laws.logits.new_full((B * F, sampler.vocabulary), float("-inf"), dtype=torch.float32)
    scores.index_copy_(1, heads.ids, laws.logits.float().flatten(0, 1))
    if sampler.pointwise and sampler.processors:
        scores = sampler.processors(sampler.layout.tokens[:1, :1].expand(B * F, -1), scores)
    return scores.softmax(-1).view(B, F, -1)


def _draw(q: Tensor, sampler: Sampler, limit: list[int], level: int) -> Tensor:
    """One token from each of q [B, F, V]: [B, F]. A row that may not go as deep draws nothing: 0."""
    rows = [row for row, deepest in enumerate(limit) if deepest >= level]
    tokens = torch.zeros(q.shape[:2], dtype=torch.long, device=q.device)
    for f in range(q.shape[1]):
        tokens[rows, f] = sampler.multinomial(q[rows, f], rows)
    return tokens


def _tree(
    newest: Tensor, tokens: list[Tensor], kinds: list[Tensor], laws: list[Tensor], source: Tensor, limit: list[int]
) -> DraftTree:
    """Chains below the root as a tree with trials; level by level, chain by chain."""
    B, count = source.shape
    depth, M = len(tokens), laws[0].shape[1]
    N = 1 + depth * count
    node = torch.arange(1, N, device=newest.device).view(depth, count)
    parents = torch.cat([torch.full((1,), -1), torch.zeros(count, dtype=torch.long), node[:-1].flatten().cpu()])
    depths = torch.cat([torch.zeros(1, dtype=torch.long), torch.arange(1, depth + 1).repeat_interleave(count)])
    valid = depths[None] <= torch.tensor(limit)[:, None]
    child = torch.full((B, N, count), -1, dtype=torch.long)
    law = torch.zeros_like(child)
    child[:, 0] = node[0].cpu()
    law[:, 0] = source.cpu()
    for level in range(1, depth):
        for chain in range(count):
            child[:, node[level - 1, chain], 0] = node[level, chain]
            law[:, node[level - 1, chain], 0] = M + (level - 1) * count + chain
    child = child.masked_fill(~valid.gather(1, child.clamp_min(0).flatten(1)).view_as(child), -1)
    drafted = torch.cat([newest[:, None], torch.stack(tokens, 1).flatten(1)], 1)
    q = torch.cat(laws, 1)
    device = newest.device
    every = lambda x: x.expand(B, -1).to(device)  # noqa: E731
    chosen = [_of(x, t, source if level == 0 else None) for level, (x, t) in enumerate(zip(laws, tokens, strict=True))]
    probability = torch.cat([torch.ones(B, 1, device=device), *chosen], 1)
    return DraftTree(
        tokens=drafted.masked_fill(~valid.to(device), 0),
        parents=every(parents).masked_fill(~valid.to(device), -1),
        depths=every(depths).masked_fill(~valid.to(device), 0),
        valid=valid.to(device),
        modality=torch.cat([torch.zeros_like(newest)[:, None], torch.stack(kinds, 1).flatten(1)], 1),
        fixed=torch.zeros(B, N, dtype=torch.bool, device=device),
        height=depth,
        trials=Trials(child.to(device), law.to(device), q),
        q=probability,
    )


def _of(law: Tensor, tokens: Tensor, source: Tensor | None) -> Tensor:
    """q of `tokens` [B, F] under law [B, M or F, V], chain f's law being number source[b, f] at the root."""
    own = law if source is None else law.gather(1, source[..., None].expand(-1, -1, law.shape[-1]))
    return own.gather(-1, tokens[..., None]).squeeze(-1)
