"""Draws draft chains: for a drafter that samples its candidates instead of ranking them.

One candidate is drawn below each node, and at the root one for each chain. The number of draws depends on the router
and the budget alone, never on what was drawn, as exact verification requires (docs/verification.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from msd.core.modality import LANGUAGE
from msd.core.sampling import Sampler
from msd.core.tree import DraftTree, SampledCandidates
from msd.drafters.toolkit.growth import Distributions, DraftVocabulary, Levels, Shape, Subtrees, descend
from msd.drafters.toolkit.selection import budgets
from msd.planning.plan import Budget

BRANCHES = 3  # sampled chains at the root


def draw(
    levels: Levels,
    vocabulary: DraftVocabulary,
    subtrees: Subtrees,
    modality_ids: Sequence[int],
    newest: Tensor,
    budget: Budget,
    sampler: Sampler,
    shape: Shape,
) -> DraftTree:
    """Draws at most `BRANCHES` chains, as deep as `shape`, the budget and the row's own limit allow."""
    count = min(BRANCHES if budget.width is None else budget.width, budget.nodes)
    shares = [budgets(row, budget.nodes) for row in subtrees.share.tolist()]
    source = torch.tensor([_assign(row, count) for row in shares], device=newest.device)  # the subtree of each chain
    ids = torch.tensor(modality_ids, device=newest.device)
    chain = torch.arange(count, device=newest.device).expand(len(newest), -1)
    distributions: list[Tensor] = []  # [B, count, V] of each level
    tokens: list[Tensor] = []
    modalities: list[Tensor] = []

    def expand(level_distributions: Distributions, level: int) -> tuple[Tensor, Tensor]:
        q = _full(level_distributions, vocabulary, sampler)
        modality = ids[level_distributions.weights.argmax(-1)]
        if level == 1:  # one distribution per subtree
            q, modality = q.gather(1, source[..., None].expand(-1, -1, q.shape[-1])), modality.gather(1, source)
        distributions.append(q)
        tokens.append(_sampled(q, sampler, budget.depth, level))
        modalities.append(modality)
        return tokens[-1], source if level == 1 else chain

    descend(levels, subtrees.weights, min(max(budget.depth), shape.depth, budget.nodes // count), expand)
    return _chains(newest, tokens, modalities, distributions, budget.depth)


def _assign(share: Sequence[int], count: int) -> list[int]:
    """Deals `count` draws to subtrees in proportion to `share`, the likeliest first: highest averages (Jefferson)."""
    given, dealt = [0] * len(share), []
    for _ in range(count):
        dealt.append(max(range(len(share)), key=lambda m: share[m] / (given[m] + 1)))
        given[dealt[-1]] += 1
    return dealt


def _full(distributions: Distributions, vocabulary: DraftVocabulary, sampler: Sampler) -> Tensor:
    """Returns q [B, F, V] over the target's ids, after those of the request's processors that read scores only."""
    B, F, _ = distributions.logits.shape
    scores = distributions.logits.new_full((B * F, sampler.vocabulary), float("-inf"), dtype=torch.float32)
    scores.index_copy_(1, vocabulary.ids, distributions.logits.float().flatten(0, 1))
    if sampler.pointwise and sampler.processors:
        scores = sampler.processors(sampler.layout.tokens[:1, :1].expand(B * F, -1), scores)
    return scores.softmax(-1).view(B, F, -1)


def _sampled(q: Tensor, sampler: Sampler, limit: list[int], level: int) -> Tensor:
    """Draws one token from each of q [B, F, V]: [B, F]; 0 in rows that may not draft this level."""
    rows = [row for row, deepest in enumerate(limit) if deepest >= level]
    tokens = torch.zeros(q.shape[:2], dtype=torch.long, device=q.device)
    for f in range(q.shape[1]):
        tokens[rows, f] = sampler.multinomial(q[rows, f], rows)
    return tokens


def _chains(
    newest: Tensor, tokens: list[Tensor], modalities: list[Tensor], distributions: list[Tensor], limit: list[int]
) -> DraftTree:
    """Builds a tree of sampled candidates from chains, in order of level, then chain; node n has distribution n - 1."""
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
    chosen = [q.gather(-1, t[..., None]).squeeze(-1) for q, t in zip(distributions, tokens, strict=True)]
    return DraftTree(
        tokens=drafted.masked_fill(~valid, 0),
        parents=parents.masked_fill(~valid, -1),
        depths=depths.masked_fill(~valid, 0),
        valid=valid,
        modality=torch.cat([torch.full_like(newest, LANGUAGE.id)[:, None], *modalities], 1),
        deterministic=torch.zeros_like(valid),
        height=depth,
        candidates=SampledCandidates(child, (child - 1).clamp_min(0), torch.cat(distributions, 1)),
        q=torch.cat([torch.ones_like(chosen[0][:, :1]), *chosen], 1),
    )
