"""Grows the subtrees of a draft and merges them under one root.

A drafter computes its distributions level by level (`Levels`). Each subtree keeps its nodes of highest score: the
log-probability that the whole path to a node is the target's choice. Equal paths of several subtrees become one node.
Everything runs on whole batches, with two host synchronisations: which subtrees exist, and the size of the tree.

A drafter that samples (`draw`) draws its candidates instead of ranking them: one below each node, and at the root one
for each chain. The number of draws depends on the router and the budget alone, never on what was drawn, as exact
verification requires (docs/verification.md).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from msd.core.modality import LANGUAGE
from msd.core.sampling import Sampler
from msd.core.tree import DraftTree, SampledCandidates
from msd.drafters.toolkit.chance import NodeFeatures
from msd.planning.plan import Budget

NEVER = -1e30  # score of a candidate that must not become a node
PRIME = 1_000_003
MEMORY = 0.9  # of the running mean of a level's cost
BRANCHES = 3  # sampled chains at the root


@dataclass
class Distributions:
    """Draft logits [B, F, Vd] below F frontier nodes, confidence logits [B, F], and modality weights [B, F, M]."""

    logits: Tensor
    confidence: Tensor
    weights: Tensor


class Levels(Protocol):
    """The draft distributions of one step, from the root downwards.

    A *frontier* is the F nodes per row that are expanded at one level. The caller gives the modality weights at the
    root (one subtree per modality); below it the network gives them.
    """

    def root(self, weights: Tensor) -> Distributions:
        """Computes the distributions of the first draft token under F modality weights [B, F, M]."""

    def below(self, tokens: Tensor, above: Tensor) -> Distributions:
        """Computes those below the frontier `tokens` [B, F]; above: [B, F], their parents in the last frontier."""


class DraftVocabulary(Protocol):
    """The tokens that a drafter can propose, and the probability that one is accepted."""

    @property
    def ids(self) -> Tensor:
        """[Vd] int64: the target's id of each draft token."""

    def log_acceptance(self, node: NodeFeatures) -> Tensor:
        """Log-probability that a candidate is the target's choice, given that its parent was."""


@dataclass(frozen=True)
class Shape:
    """The shape of a subtree: at most `width` expanded nodes and children per node on each of `depth` levels."""

    width: int
    depth: int


@dataclass
class Subtrees:
    """M subtrees in each of B rows.

    weights: [B, M, experts], modality weights of the first distribution. share: [B, M] probabilities, 0 where a row has
    no such subtree. budget: [B, M], nodes. shapes: M of them.
    """

    weights: Tensor
    share: Tensor
    budget: Tensor
    shapes: list[Shape]

    @classmethod
    def single(cls, newest: Tensor, nodes: int, shape: Shape) -> Subtrees:
        """One subtree with all nodes below each of the roots `newest` [B]."""
        one = torch.ones(len(newest), 1, device=newest.device)
        return cls(one[..., None], one, one.long() * nodes, [shape])

    @classmethod
    def chosen(cls, route: Tensor, active: Tensor, nodes: int, shapes: Sequence[Shape]) -> Subtrees:
        """One subtree for each modality that is `active` [B, M] in some row; nodes are shared in proportion to `route`.

        route: [B, M] router probabilities. shapes: of all M modalities.
        """
        M = route.shape[1]
        existing = [m for m, any_ in enumerate(active.any(0).tolist()) if any_]
        share = (route * active)[:, existing]
        share = share / share.sum(-1, keepdim=True)
        budget = (share * nodes).floor().long()
        left = nodes - budget.sum(-1, keepdim=True)
        rank = (share * nodes - budget).argsort(dim=-1, descending=True).argsort(-1)
        budget = (budget + (rank < left)) * active[:, existing]
        weights = torch.eye(M, device=route.device, dtype=route.dtype)[existing].expand(len(route), -1, -1)
        return cls(weights, share, budget, [shapes[m] for m in existing])


class LevelCost:
    """Measures the seconds that a draft level takes (running mean) and decides whether another level pays."""

    def __init__(self) -> None:
        self.seconds, self._started = 0.0, 0.0

    def start(self) -> None:
        """Starts the clock of a level."""
        self._started = time.perf_counter()

    def stop(self) -> None:
        """Adds the level's seconds to the running mean."""
        seconds = time.perf_counter() - self._started
        self.seconds = MEMORY * self.seconds + (1 - MEMORY) * seconds if self.seconds else seconds

    def pays(self, before: float, expected: float, token_seconds: float, node_seconds: float) -> bool:
        """Whether the next level is expected to save more time than it costs.

        expected, before: expected accepted tokens per row of the last level and of the one above it; the next level is
        assumed to fall off by the same factor. token_seconds: cost of a token without drafting. node_seconds: extra
        cost of the target's pass for one more node in every row; small for one row, large for a large batch.
        """
        return expected * expected / max(before, 1e-9) * token_seconds >= self.seconds + node_seconds


def expected_accepted(score: Tensor, subtree: Tensor, subtrees: int) -> float:
    """Mean over rows of the expected accepted nodes of a level, from scores and subtree indices [B, N].

    Subtrees overlap, so only the best subtree of a row counts.
    """
    chance = F.one_hot(subtree, subtrees) * score.exp()[..., None]
    return float(chance.sum(1).amax(-1).mean())


def _descend(
    levels: Levels, weights: Tensor, depth: int, expand: Callable[[Distributions, int], tuple[Tensor, Tensor] | None]
) -> None:
    """Calls `expand(distributions, level)` for levels 1 to `depth`.

    `expand` returns the next frontier and its parents in the last one (both [B, F], see `Levels.below`), or None to
    stop.
    """
    distributions = levels.root(weights)
    for level in range(1, depth + 1):
        frontier = expand(distributions, level)
        if frontier is None or level == depth:
            return
        distributions = levels.below(*frontier)


@dataclass
class _Candidates:
    """Candidates of all subtrees, level after level: [B, P]. parent: index in P, -1 at the root. path: a hash."""

    tokens: Tensor
    score: Tensor
    q: Tensor
    subtree: Tensor
    parent: Tensor
    depth: Tensor
    modality: Tensor
    path: Tensor

    @classmethod
    def joined(cls, parts: Sequence[_Candidates]) -> _Candidates:
        return cls(*(torch.cat([getattr(p, name) for p in parts], -1) for name in cls.__annotations__))

    def at(self, index: Tensor) -> _Candidates:
        """Gathers the candidates `index` [B, S]."""
        return _Candidates(*(getattr(self, name).gather(-1, index) for name in self.__annotations__))


def _ranked(score: Tensor, subtree: Tensor, subtrees: int) -> tuple[Tensor, Tensor]:
    """Returns the order [B, N] by falling score, and the rank [B, N] of each ordered entry within its subtree."""
    order = score.argsort(dim=-1, descending=True, stable=True)
    own = F.one_hot(subtree.gather(-1, order), subtrees)
    return order, ((own.cumsum(1) - 1) * own).sum(-1)


def grow(
    levels: Levels,
    vocabulary: DraftVocabulary,
    subtrees: Subtrees,
    modality_ids: Tensor,
    newest: Tensor,
    budget: Budget,
    temperature: float | None = None,
    cost: LevelCost | None = None,
) -> DraftTree:
    """Grows trees of at most `budget.nodes` draft nodes; the tree of row b is at most `budget.depth[b]` levels deep.

    With `budget.seconds`, the number of nodes maximises expected tokens per second; with `cost`, levels end where they
    no longer pay. modality_ids: [experts] registry ids. newest: [B], the roots. temperature: of a request that samples,
    whose node scores are log q; None for greedy decoding.
    """
    nodes = budget.nodes
    deepest = min(max(budget.depth, default=0), max(s.depth for s in subtrees.shapes))
    if deepest < 1 or nodes < 1:
        return DraftTree.root_only(newest)
    growth = _Growth(vocabulary, subtrees, modality_ids, budget, temperature, cost, deepest)
    _descend(levels, subtrees.weights, deepest, growth.expand)
    selected = _select(_Candidates.joined(growth.candidates), subtrees, nodes)
    return _merge(selected, newest, nodes, budget.seconds)


@dataclass
class _Growth:
    """The growing subtrees of one step (see `grow`). Tensors [B, F] describe the frontier; at the root F = M."""

    vocabulary: DraftVocabulary
    subtrees: Subtrees
    modality_ids: Tensor
    budget: Budget
    temperature: float | None
    cost: LevelCost | None
    deepest: int

    def __post_init__(self) -> None:
        share, shapes = self.subtrees.share, self.subtrees.shapes
        B, self.count = share.shape
        self.limit = torch.tensor(self.budget.depth, device=share.device)
        self.widths = torch.tensor([s.width for s in shapes], device=share.device)
        self.depths = torch.tensor([s.depth for s in shapes], device=share.device)
        self.children = min(max(s.width for s in shapes), len(self.vocabulary.ids))
        self.widest = min(self.budget.nodes, sum(s.width for s in shapes))
        self.subtree = torch.arange(self.count, device=share.device).expand(B, -1)
        self.score = torch.zeros(B, self.count, device=share.device).masked_fill(share == 0, NEVER)
        self.parent, self.path = torch.full_like(self.subtree, -1), torch.zeros_like(self.subtree)
        self.candidates: list[_Candidates] = []  # of each level
        self.expected = 1.0  # accepted tokens per row of the last level

    def expand(self, distributions: Distributions, level: int) -> tuple[Tensor, Tensor] | None:
        """Adds a level of candidates; returns the next frontier and its parents (see `_descend`)."""
        candidates = self._candidates(distributions, level)
        self.candidates.append(candidates)
        if level == self.deepest:
            return None
        order = self._advance(candidates)
        if self.cost is not None and self.budget.passes is not None:
            if level > 1:
                self.cost.stop()
            before, self.expected = self.expected, expected_accepted(self.score, self.subtree, self.count)
            if not self.cost.pays(before, self.expected, self.budget.passes[0], self.budget.node_seconds):
                return None
            self.cost.start()
        return candidates.tokens.gather(-1, order), order // self.children

    def _candidates(self, distributions: Distributions, level: int) -> _Candidates:
        """Returns the most likely children of every frontier node."""
        k, logits = self.children, distributions.logits.float()
        top, index = logits.log_softmax(-1).topk(k, -1)  # [B, F, k]
        q = top
        if self.temperature is not None and self.temperature != 1.0:
            q = (logits / self.temperature).log_softmax(-1).gather(-1, index)
        chance = q
        if self.temperature is None:
            chance = self.vocabulary.log_acceptance(NodeFeatures(top, distributions.confidence.float()[..., None]))
        score = self.score[..., None] + chance - 1e-5  # strictly below the parent's
        allowed = torch.arange(k, device=q.device) < self.widths[self.subtree][..., None]
        allowed = allowed & (level <= self.depths[self.subtree])[..., None] & (level <= self.limit)[:, None, None]
        score = score.masked_fill(~allowed, NEVER).flatten(1)
        tokens = self.vocabulary.ids[index].flatten(1)
        spread = lambda x: x[..., None].expand(-1, -1, k).flatten(1)  # noqa: E731
        modality = spread(self.modality_ids[distributions.weights.argmax(-1)])
        path, depth = spread(self.path) * PRIME + tokens + 1, torch.full_like(tokens, level)
        subtree, parent = spread(self.subtree), spread(self.parent)
        return _Candidates(tokens, score, q.exp().flatten(1), subtree, parent, depth, modality, path)

    def _advance(self, level: _Candidates) -> Tensor:
        """Makes the best candidates of the newest level the frontier; returns their indices in it [B, F]."""
        order, rank = _ranked(level.score, level.subtree, self.count)
        out = rank >= self.widths[level.subtree.gather(-1, order)]
        order = order.gather(-1, out.long().argsort(dim=-1, stable=True))[:, : min(self.widest, order.shape[1])]
        self.score, self.subtree, self.path = (x.gather(-1, order) for x in (level.score, level.subtree, level.path))
        self.score = self.score.masked_fill(out.sort(dim=-1, stable=True).values[:, : order.shape[1]], NEVER)
        self.parent = order + sum(c.tokens.shape[1] for c in self.candidates[:-1])
        return order


def _select(candidates: _Candidates, subtrees: Subtrees, nodes: int) -> _Candidates:
    """Orders the candidates by priority: [B, S]; a score of `NEVER` marks those that must not become nodes.

    Those within their subtree's budget come first, by score, then the others, which fill what merging frees. A parent
    precedes its children. `parent` becomes an index into S, -1 at the root.
    """
    M = subtrees.budget.shape[1]
    score = candidates.score + subtrees.share.log().gather(-1, candidates.subtree)
    order, rank = _ranked(score, candidates.subtree, M)
    over = rank >= subtrees.budget.gather(-1, candidates.subtree.gather(-1, order))
    order = order.gather(-1, over.long().argsort(dim=-1, stable=True))
    slot = order.argsort(-1)
    chosen = candidates.at(order[:, : M * nodes])
    chosen.parent = torch.where(chosen.parent < 0, -1, slot.gather(-1, chosen.parent.clamp_min(0)))
    return chosen


def _best_size(score: Tensor, seconds: Sequence[float]) -> Tensor:
    """Returns the number of nodes (0-dim), equal for all rows, that maximises expected tokens per second.

    score: [B, S], log-probability that a node is accepted. seconds[n]: of a step with n nodes. A row without candidates
    has finished and emits nothing.
    """
    chances = score.sort(dim=1, descending=True).values[:, : len(seconds) - 1].exp()
    unfinished = (score > NEVER / 2).any(1).sum()
    expected = unfinished + F.pad(chances.sum(0).cumsum(0), (1, 0))
    return (expected / score.new_tensor(seconds[: len(expected)])).argmax()


def _merge(candidates: _Candidates, newest: Tensor, nodes: int, seconds: Sequence[float] | None) -> DraftTree:
    """Builds one tree per row from the first `nodes` distinct paths; with `seconds`, from the best of them only."""
    valid = candidates.score > NEVER / 2
    B, S = valid.shape
    same = valid[:, None].expand(-1, S, -1)
    for x in (candidates.path, candidates.tokens, candidates.depth):
        same = same & (x[:, :, None] == x[:, None])
    first = same.int().argmax(-1)  # of the equal candidates
    kept = valid & (first == torch.arange(S, device=valid.device))
    kept = kept & (kept.cumsum(1) <= nodes)
    if seconds is not None:  # of equal paths the highest score counts, so that a parent outranks its children
        score = candidates.score[:, None].masked_fill(~same, NEVER).amax(-1).masked_fill(~kept, NEVER)
        kept = kept & (score.argsort(dim=1, descending=True).argsort(1) < _best_size(score, seconds))
    number = kept.cumsum(1)  # the node of a kept candidate; the root is node 0
    parents = number.gather(1, first.gather(1, candidates.parent.clamp_min(0)))
    parents = torch.where(candidates.parent < 0, 0, parents)
    size, height = torch.stack([kept.sum(1).max(), (candidates.depth * kept).max()]).tolist()
    order = (~kept).long().argsort(dim=1, stable=True)[:, :size]
    present = kept.gather(1, order)

    def column(x: Tensor, root: Tensor | float, empty: float) -> Tensor:
        rest = x.gather(1, order).masked_fill(~present, empty)
        return torch.cat([torch.as_tensor(root, device=x.device).to(x.dtype).expand(B)[:, None], rest], 1)

    return DraftTree(
        tokens=column(candidates.tokens, newest, 0),
        parents=column(parents, -1, -1),
        depths=column(candidates.depth, 0, 0),
        valid=column(kept, True, False),
        modality=column(candidates.modality, LANGUAGE.id, LANGUAGE.id),
        deterministic=column(kept, False, False),
        height=int(height),
        q=column(candidates.q, 1.0, 0.0),
    )


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
    """Draws at most `BRANCHES` chains, as deep as `shape`, the budget and the row's own limit allow."""
    count = min(BRANCHES if budget.width is None else budget.width, budget.nodes)
    share = subtrees.budget.double() / subtrees.budget.sum(-1, keepdim=True)
    source = _assign(share, count)  # [B, count], the subtree of each chain
    chain = torch.arange(count, device=newest.device).expand(len(newest), -1)
    distributions: list[Tensor] = []  # [B, count, V] of each level
    tokens: list[Tensor] = []
    modalities: list[Tensor] = []

    def expand(level_distributions: Distributions, level: int) -> tuple[Tensor, Tensor]:
        q = _full(level_distributions, vocabulary, sampler)
        modality = modality_ids[level_distributions.weights.argmax(-1)]
        if level == 1:  # one distribution per subtree
            q, modality = q.gather(1, source[..., None].expand(-1, -1, q.shape[-1])), modality.gather(1, source)
        distributions.append(q)
        tokens.append(_sampled(q, sampler, budget.depth, level))
        modalities.append(modality)
        return tokens[-1], source if level == 1 else chain

    _descend(levels, subtrees.weights, min(max(budget.depth), shape.depth, budget.nodes // count), expand)
    return _chains(newest, tokens, modalities, distributions, budget.depth)


def _assign(share: Tensor, count: int) -> Tensor:
    """Deals `count` draws to subtrees in proportion to `share` [B, M], the likeliest first: [B, count]."""
    given = torch.zeros_like(share)
    dealt = []
    for _ in range(count):
        subtree = (share / (given + 1)).argmax(-1)  # highest averages (Jefferson)
        given.scatter_add_(1, subtree[:, None], torch.ones_like(share[:, :1]))
        dealt.append(subtree)
    return torch.stack(dealt, 1)


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
