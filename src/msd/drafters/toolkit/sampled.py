"""Sampled candidates: drawn from the subtrees' distributions instead of ranked.

The root has draws for each active modality by its share of the budget; below it every node has one. How many there are
follows from the router and the budget alone, never from what was drawn, as exact verification needs
(docs/verification.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from msd.drafters.toolkit.growth import Distributions, DraftVocabulary, Levels, Shape, Subtrees
from msd.modality import LANGUAGE
from msd.plan import Budget
from msd.sampling import Sampler
from msd.tree import DraftTree, Trials

BRANCHES = 3  # chains at the root


def draw(
    levels: Levels,
    vocabulary: DraftVocabulary,
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
    shared = _full(first, vocabulary, sampler)  # [B, M, V]
    drawn = [shared.gather(1, source[..., None].expand(-1, -1, shared.shape[-1]))]  # [B, count, V] a level
    tokens = [_draw(drawn[0], sampler, budget.depth, 1)]
    kinds = [modality_ids[first.weights.argmax(-1)].gather(1, source)]
    above = source
    for level in range(2, depth + 1):
        below = levels.below(tokens[-1], above)
        above = torch.arange(count, device=device).expand(B, -1)
        drawn.append(_full(below, vocabulary, sampler))
        tokens.append(_draw(drawn[-1], sampler, budget.depth, level))
        kinds.append(modality_ids[below.weights.argmax(-1)])
    return _tree(newest, tokens, kinds, drawn, budget.depth)


def _assign(share: Tensor, count: int) -> Tensor:
    """`count` draws dealt to subtrees in proportion to `share` [B, M], the likeliest first: [B, count]."""
    given = torch.zeros_like(share)
    dealt = []
    for _ in range(count):
        turn = (share / (given + 1)).argmax(-1)  # highest averages (Jefferson)
        given.scatter_add_(1, turn[:, None], torch.ones_like(share[:, :1]))
        dealt.append(turn)
    return torch.stack(dealt, 1)


def _full(found: Distributions, vocabulary: DraftVocabulary, sampler: Sampler) -> Tensor:
    """[B, F, V] over the target's ids, through the request's processors where these look at scores alone."""
    B, F, _ = found.logits.shape
    scores = found.logits.new_full((B * F, sampler.vocabulary), float("-inf"), dtype=torch.float32)
    scores.index_copy_(1, vocabulary.ids, found.logits.float().flatten(0, 1))
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
    newest: Tensor, tokens: list[Tensor], kinds: list[Tensor], drawn: list[Tensor], limit: list[int]
) -> DraftTree:
    """Chains below the root as a tree with trials; level by level, chain by chain. Node n is of distribution n - 1."""
    (B, count), depth, device = tokens[0].shape, len(tokens), newest.device
    N = 1 + depth * count
    node = torch.arange(N, device=device)
    parents = (node - count).clamp_min(0).masked_fill(node == 0, -1).expand(B, -1)
    depths = ((node + count - 1) // count).expand(B, -1)
    valid = depths <= torch.tensor(limit, device=device)[:, None]
    child = torch.full((B, N, count), -1, device=device)
    child[:, 0] = node[1 : 1 + count]
    child[:, 1 : N - count, 0] = node[1 + count :]
    child = child.masked_fill(~valid.gather(1, child.clamp_min(0).flatten(1)).view_as(child), -1)
    drafted = torch.cat([newest[:, None], *tokens], 1)
    chosen = [q.gather(-1, t[..., None]).squeeze(-1) for q, t in zip(drawn, tokens, strict=True)]
    return DraftTree(
        tokens=drafted.masked_fill(~valid, 0),
        parents=parents.masked_fill(~valid, -1),
        depths=depths.masked_fill(~valid, 0),
        valid=valid,
        modality=torch.cat([torch.full_like(newest, LANGUAGE.id)[:, None], *kinds], 1),
        fixed=torch.zeros_like(valid),
        height=depth,
        trials=Trials(child, (child - 1).clamp_min(0), torch.cat(drawn, 1)),
        q=torch.cat([torch.ones_like(chosen[0][:, :1]), *chosen], 1),
    )
