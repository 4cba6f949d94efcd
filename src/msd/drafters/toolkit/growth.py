"""Growing the subtrees of a draft and merging them under one root.

A drafter gives the distributions of a draft level by level (`Levels`). Every subtree has a shape and a share of the
node budget. Within a subtree the nodes kept are those most likely to be reached: a node's score is the log of the
chance that all of its path is the target's choice (`DraftVocabulary.hit`). Equal paths of several subtrees become one
node. All of it is tensor operations on whole batches, with two looks at the host: which subtrees exist, and how large
the tree came out.

Sampled candidates (`draw`) are drawn from the subtrees' distributions instead of ranked. The root has draws for each
active modality by its share of the budget; below it every node has one. How many there are follows from the router and
the budget alone, never from what was drawn, as exact verification needs (docs/verification.md).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from msd.core.modality import LANGUAGE
from msd.core.sampling import Sampler
from msd.core.tree import DraftTree, SampledCandidates
from msd.planning.plan import Budget

NEVER = -1e30
PRIME = 1_000_003
MEMORY = 0.9  # of the running mean of a level's cost
BRANCHES = 3  # chains at the root


@dataclass
class Distributions:
    """Draft distributions of the F nodes of a frontier.

    logits: [B, F, Vd] over the draft vocabulary. sure: [B, F] confidence logits. weights: [B, F, M] of modalities.
    """

    logits: Tensor
    sure: Tensor
    weights: Tensor


class Levels(Protocol):
    """The draft distributions of one step, from the root downwards.

    A *frontier* holds the F nodes per row that are expanded at one level. The modality weights are the caller's at the
    root (one subtree per modality) and the network's below it.
    """

    def root(self, weights: Tensor) -> Distributions:
        """Distributions of the first drafted token under F modality weights [B, F, M]."""
        ...

    def below(self, tokens: Tensor, above: Tensor) -> Distributions:
        """Below the frontier `tokens` [B, F], drafted from the entries `above` [B, F] of the frontier before."""
        ...


class DraftVocabulary(Protocol):
    """The tokens that a drafter proposes, and the chance that one is right."""

    @property
    def ids(self) -> Tensor:
        """[Vd] int64: the target's id of each."""
        ...

    def hit(self, log_q: Tensor, sure: Tensor) -> Tensor:
        """Log of the chance that a candidate is the target's choice: from its log q and its parent's confidence."""
        ...


@dataclass(frozen=True)
class Shape:
    """A subtree: `width` nodes go on per level, `depth` levels."""

    width: int
    depth: int


@dataclass
class Subtrees:
    """M subtrees of B rows. weights: [B, M, experts] of the first distribution. share: [B, M] probabilities, 0 where a
    row has no such subtree. budget: [B, M] nodes. shapes: M of them.
    """

    weights: Tensor
    share: Tensor
    budget: Tensor
    shapes: list[Shape]

    @classmethod
    def single(cls, newest: Tensor, nodes: int, shape: Shape) -> Subtrees:
        """One for each of the roots `newest` [B], with all the nodes."""
        one = torch.ones(len(newest), 1, device=newest.device)
        return cls(one[..., None], one, one.long() * nodes, [shape])

    @classmethod
    def chosen(cls, route: Tensor, active: Tensor, nodes: int, shapes: Sequence[Shape]) -> Subtrees:
        """A subtree for each of M modalities that is `active` [B, M] in some row, by router probabilities [B, M].

        They share the nodes in proportion to the probabilities. shapes: of all M.
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
    """Whether another level of a draft pays: running mean of the seconds that a level takes here."""

    def __init__(self) -> None:
        self.level, self._begun = 0.0, 0.0

    def begin(self) -> None:
        """A level begins."""
        self._begun = time.perf_counter()

    def end(self) -> None:
        """The level is done."""
        seconds = time.perf_counter() - self._begun
        self.level = MEMORY * self.level + (1 - MEMORY) * seconds if self.level else seconds

    def pays(self, before: float, reach: float, token: float, node: float) -> bool:
        """Whether a level below is worth its seconds, and those of a node in every row.

        reach, before: tokens a row that the level above it, and the one above that, are expected to give. The next one
        is taken to fall off as that one did. token: seconds that a token costs without drafting. node: seconds that
        the target's pass takes longer by a node in every row; little for one answer, much for a large batch.
        """
        return reach * reach / max(before, 1e-9) * token >= self.level + node


def reached(score: Tensor, tree: Tensor, trees: int) -> float:
    """Expected accepted nodes a row among a level's [B, N], by log chance: of the best subtree, as subtrees overlap."""
    chance = F.one_hot(tree, trees) * score.exp()[..., None]
    return float(chance.sum(1).amax(-1).mean())


@dataclass
class _Pool:
    """Candidates of all subtrees, level after level: [B, P]. tree: whose they are. parent: in P, -1 at the root."""

    tokens: Tensor
    score: Tensor
    q: Tensor
    tree: Tensor
    parent: Tensor
    depth: Tensor
    kind: Tensor
    path: Tensor

    @classmethod
    def of(cls, parts: Sequence[_Pool]) -> _Pool:
        return cls(*(torch.cat([getattr(p, name) for p in parts], -1) for name in cls.__annotations__))

    def at(self, index: Tensor) -> _Pool:
        """The candidates `index` [B, S]."""
        return _Pool(*(getattr(self, name).gather(-1, index) for name in self.__annotations__))


def _ranked(score: Tensor, tree: Tensor, trees: int) -> tuple[Tensor, Tensor]:
    """Order [B, N] by falling score, and each ordered entry's rank among those of its own subtree, from 0."""
    order = score.argsort(dim=-1, descending=True, stable=True)
    own = F.one_hot(tree.gather(-1, order), trees)
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
    """Trees of at most `budget.nodes` drafted nodes, row b at most `budget.depth[b]` levels deep.

    Where the budget tells seconds, trees have as many nodes as give most tokens per second, and, by `cost`, as many
    levels as pay. modality_ids [experts]: registry ids. newest [B]: the roots. temperature: of a request that samples;
    None for greedy decoding. It decides what a node is worth: the chance that the target chooses it.
    """
    nodes = budget.nodes
    deepest = min(max(budget.depth, default=0), max(s.depth for s in subtrees.shapes))
    if deepest < 1 or nodes < 1:
        return DraftTree.root_only(newest)
    limit = torch.tensor(budget.depth, device=newest.device)
    growth = _Growth(levels, vocabulary, subtrees, modality_ids, limit, temperature, nodes)
    pool = growth.expand(deepest, None if budget.passes is None else cost, budget)
    return _merge(_select(pool, subtrees, nodes), newest, nodes, budget.seconds)


class _Growth:
    """The frontier of one step's subtrees. Tensors [B, F]: of its F nodes, M at the root, one for each subtree.

    limit: [B] levels of each row. At most `nodes` nodes a level go on.
    """

    def __init__(
        self,
        levels: Levels,
        vocabulary: DraftVocabulary,
        subtrees: Subtrees,
        modality_ids: Tensor,
        limit: Tensor,
        temperature: float | None,
        nodes: int,
    ) -> None:
        self.levels, self.vocabulary, self.subtrees, self.modality_ids = levels, vocabulary, subtrees, modality_ids
        self.limit, self.temperature = limit, temperature
        B, self.trees = subtrees.budget.shape
        device, shapes = subtrees.budget.device, subtrees.shapes
        self.widths = torch.tensor([s.width for s in shapes], device=device)
        self.depths = torch.tensor([s.depth for s in shapes], device=device)
        self.children = min(max(s.width for s in shapes), len(vocabulary.ids))
        self.widest = min(nodes, sum(s.width for s in shapes))
        self.tree = torch.arange(self.trees, device=device).expand(B, -1)
        self.score = torch.zeros(B, self.trees, device=device).masked_fill(subtrees.share == 0, NEVER)
        self.parent, self.path = torch.full_like(self.tree, -1), torch.zeros_like(self.tree)

    def expand(self, deepest: int, cost: LevelCost | None, budget: Budget) -> _Pool:
        """All candidates down to level `deepest`; with a cost, levels end where they no longer pay."""
        found = self.levels.root(self.subtrees.weights)
        pools: list[_Pool] = []
        offset, before = 0, 1.0
        for level in range(1, deepest + 1):
            pools.append(self._candidates(found, level))
            if level == deepest:
                break
            order = self._advance(pools[-1], offset)
            offset += pools[-1].tokens.shape[1]
            if cost is not None and budget.passes is not None:
                if level > 1:
                    cost.end()
                reach = reached(self.score, self.tree, self.trees)
                if not cost.pays(before, reach, budget.passes[0], budget.node_seconds):
                    break
                before = reach
                cost.begin()
            found = self.levels.below(pools[-1].tokens.gather(-1, order), order // self.children)
        return _Pool.of(pools)

    def _candidates(self, found: Distributions, level: int) -> _Pool:
        """The likeliest children of every node of the frontier."""
        k = self.children
        top, index = found.logits.float().log_softmax(-1).topk(k, -1)  # [B, F, k]
        q = top
        if self.temperature is not None and self.temperature != 1.0:
            q = (found.logits.float() / self.temperature).log_softmax(-1).gather(-1, index)
        hit = self.vocabulary.hit(top, found.sure.float()[..., None]) if self.temperature is None else q
        worth = self.score[..., None] + hit - 1e-5  # strictly below the parent's
        allowed = torch.arange(k, device=q.device) < self.widths[self.tree][..., None]
        allowed = allowed & (level <= self.depths[self.tree])[..., None] & (level <= self.limit)[:, None, None]
        worth = worth.masked_fill(~allowed, NEVER).flatten(1)
        tokens = self.vocabulary.ids[index].flatten(1)
        spread = lambda x: x[..., None].expand(-1, -1, k).flatten(1)  # noqa: E731
        kinds = spread(self.modality_ids[found.weights.argmax(-1)])
        paths, depth = spread(self.path) * PRIME + tokens + 1, torch.full_like(tokens, level)
        return _Pool(
            tokens, worth, q.exp().flatten(1), spread(self.tree), spread(self.parent), depth, kinds, paths
        )  # fmt: skip

    def _advance(self, pool: _Pool, offset: int) -> Tensor:
        """Makes the best candidates of a level, which begins at `offset`, the frontier: their places in it [B, F]."""
        order, rank = _ranked(pool.score, pool.tree, self.trees)
        out = rank >= self.widths[pool.tree.gather(-1, order)]
        order = order.gather(-1, out.long().argsort(dim=-1, stable=True))[:, : min(self.widest, order.shape[1])]
        self.score, self.tree, self.path = (x.gather(-1, order) for x in (pool.score, pool.tree, pool.path))
        self.score = self.score.masked_fill(out.sort(dim=-1, stable=True).values[:, : order.shape[1]], NEVER)
        self.parent = order + offset
        return order


def _select(pool: _Pool, subtrees: Subtrees, nodes: int) -> tuple[_Pool, Tensor]:
    """Candidates in the order in which they are to be kept: ([B, S] pool, valid [B, S]).

    First those within their subtree's budget, best first, then all others: they fill what merging leaves free. A parent
    stands before its children. `parent` becomes an index into S, -1 at the root.
    """
    M = subtrees.budget.shape[1]
    order, rank = _ranked(pool.score + subtrees.share.log().gather(-1, pool.tree), pool.tree, M)
    over = rank >= subtrees.budget.gather(-1, pool.tree.gather(-1, order))
    order = order.gather(-1, over.long().argsort(dim=-1, stable=True))
    slot = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    taken = pool.at(order[:, : M * nodes])
    taken.parent = torch.where(taken.parent < 0, -1, slot.gather(-1, taken.parent.clamp_min(0)))
    return taken, taken.score > NEVER / 2


def _best_size(worth: Tensor, seconds: Sequence[float]) -> Tensor:
    """How many nodes, 0-dim: most expected tokens per second, rows having the same number.

    worth: [B, S], log of the chance that a node is accepted; a step of n nodes takes seconds[n]. A row without any
    candidate has ended, and emits nothing.
    """
    chances = worth.sort(dim=1, descending=True).values[:, : len(seconds) - 1].exp()
    going = (worth > NEVER / 2).any(1).sum()
    expected = going + F.pad(chances.sum(0).cumsum(0), (1, 0))
    return (expected / worth.new_tensor(seconds[: len(expected)])).argmax()


def _merge(selected: tuple[_Pool, Tensor], newest: Tensor, nodes: int, seconds: Sequence[float] | None) -> DraftTree:
    """One tree per row of the first `nodes` different paths; equal paths become the node that comes first.

    With `seconds`, only the best of them.
    """
    pool, valid = selected
    B, S = valid.shape
    same = (pool.path[:, :, None] == pool.path[:, None]) & (pool.tokens[:, :, None] == pool.tokens[:, None])
    same = same & (pool.depth[:, :, None] == pool.depth[:, None]) & valid[:, None]
    first = same.int().argmax(-1)  # of the equal slots
    keep = valid & (first == torch.arange(S, device=valid.device))
    keep = keep & (keep.cumsum(1) <= nodes)
    if seconds is not None:  # equal paths are worth what the most hopeful subtree says, so a parent more than a child
        worth = pool.score[:, None].masked_fill(~same, NEVER).amax(-1).masked_fill(~keep, NEVER)
        keep = keep & (worth.argsort(dim=1, descending=True).argsort(1) < _best_size(worth, seconds))
    number = keep.cumsum(1)  # a kept slot's node, the root being 0
    above = number.gather(1, first.gather(1, pool.parent.clamp_min(0)))
    above = torch.where(pool.parent < 0, 0, above)
    size, height = torch.stack([keep.sum(1).max(), (pool.depth * keep).max()]).tolist()
    order = (~keep).long().argsort(dim=1, stable=True)[:, :size]

    def column(x: Tensor, root: Tensor | float, empty: float) -> Tensor:
        rest = x.gather(1, order).masked_fill(~keep.gather(1, order), empty)
        return torch.cat([torch.as_tensor(root, device=x.device).to(x.dtype).expand(B)[:, None], rest], 1)

    there = keep.gather(1, order)
    return DraftTree(
        tokens=column(pool.tokens, newest, 0),
        parents=column(above, -1, -1),
        depths=column(pool.depth, 0, 0),
        valid=torch.cat([torch.ones_like(keep[:, :1]), there], 1),
        modality=column(pool.kind, LANGUAGE.id, LANGUAGE.id),
        deterministic=torch.cat([torch.zeros_like(keep[:, :1]), there], 1),
        height=int(height),
        q=column(pool.q, 1.0, 0.0),
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
    tokens = [_drawn(drawn[0], sampler, budget.depth, 1)]
    kinds = [modality_ids[first.weights.argmax(-1)].gather(1, source)]
    above = source
    for level in range(2, depth + 1):
        below = levels.below(tokens[-1], above)
        above = torch.arange(count, device=device).expand(B, -1)
        drawn.append(_full(below, vocabulary, sampler))
        tokens.append(_drawn(drawn[-1], sampler, budget.depth, level))
        kinds.append(modality_ids[below.weights.argmax(-1)])
    return _chains(newest, tokens, kinds, drawn, budget.depth)


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


def _drawn(q: Tensor, sampler: Sampler, limit: list[int], level: int) -> Tensor:
    """One token from each of q [B, F, V]: [B, F]. A row that may not go as deep draws nothing: 0."""
    rows = [row for row, deepest in enumerate(limit) if deepest >= level]
    tokens = torch.zeros(q.shape[:2], dtype=torch.long, device=q.device)
    for f in range(q.shape[1]):
        tokens[rows, f] = sampler.multinomial(q[rows, f], rows)
    return tokens


def _chains(
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
        deterministic=torch.zeros_like(valid),
        height=depth,
        candidates=SampledCandidates(child, (child - 1).clamp_min(0), torch.cat(drawn, 1)),
        q=torch.cat([torch.ones_like(chosen[0][:, :1]), *chosen], 1),
    )
