"""Growing the subtrees of the active modalities and merging them under one root.

Every active modality has a subtree of its own shape, whose first tokens its own expert drafts, and a share of the node
budget by its router probability. Within a subtree the nodes kept are those most likely to be reached: a node's score is
the log of the chance that all of its path is the target's choice (`Heads.hit`). Paths that several subtrees propose
become one node. All of it is tensor operations on whole batches, with two looks at the host: which subtrees exist, and
how large the tree came out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from msd.drafters.msd.config import MSDConfig, Shape
from msd.drafters.msd.laws import Laws, Levels
from msd.drafters.msd.pace import Pace, reached
from msd.modality import LANGUAGE
from msd.plan import Budget
from msd.tree import DraftTree

NEVER = -1e30
PRIME = 1_000_003


class Words(Protocol):
    """Which words a drafter proposes, and what they are worth."""

    @property
    def ids(self) -> Tensor:
        """[Vd] int64: the target's id of each."""
        ...

    def hit(self, log_q: Tensor, sure: Tensor) -> Tensor:
        """Log of the chance that a candidate is the target's choice: from its log q and its parent's confidence."""
        ...


@dataclass
class Subtrees:
    """M subtrees of B rows. weights: [B, M, experts] of the first law. share: [B, M] probabilities, 0 where a row has
    no such subtree. budget: [B, M] nodes. shapes: M of them.
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


def choose(config: MSDConfig, route: Tensor, nodes: int, width: int | None = None) -> Subtrees:
    """Dynamic subtree selection: from router probabilities [B, experts] to subtrees that share `nodes`.

    A modality whose probability is below `active_from` in all rows has no subtree (a row's likeliest always has). With
    subtrees off, or for a chain (`width` 1), one subtree follows the router's mixture.
    """
    B, M = route.shape
    if not config.subtrees or width == 1:
        budget = torch.full((B, 1), nodes, device=route.device)
        return Subtrees(route[:, None], torch.ones_like(route[:, :1]), budget, [config.within(config.shared, width)])
    active = route >= (config.active_from if config.dynamic else -1.0)
    active = active | F.one_hot(route.argmax(-1), M).bool()
    existing = [m for m, any_ in enumerate(active.any(0).tolist()) if any_]
    share = (route * active)[:, existing]
    share = share / share.sum(-1, keepdim=True)
    budget = (share * nodes).floor().long()
    left = nodes - budget.sum(-1, keepdim=True)
    rank = (share * nodes - budget).argsort(dim=-1, descending=True).argsort(-1)
    budget = (budget + (rank < left)) * active[:, existing]
    weights = torch.eye(M, device=route.device, dtype=route.dtype)[existing].expand(B, -1, -1)
    shapes = [config.within(config.shapes[config.modalities[m]], width) for m in existing]
    return Subtrees(weights, share, budget, shapes)


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
    heads: Words,
    subtrees: Subtrees,
    modality_ids: Tensor,
    newest: Tensor,
    budget: Budget,
    temperature: float | None = None,
    pace: Pace | None = None,
) -> DraftTree:
    """Trees of at most `budget.nodes` drafted nodes, row b at most `budget.depth[b]` levels deep.

    Where the budget tells seconds, trees have as many nodes as give most tokens per second, and, by `pace`, as many
    levels as pay. modality_ids [experts]: registry ids. newest [B]: the roots. temperature: of a request that samples;
    None for greedy decoding. It decides what a node is worth: the chance that the target chooses it.
    """
    nodes = budget.nodes
    deepest = min(max(budget.depth, default=0), max(s.depth for s in subtrees.shapes))
    if deepest < 1 or nodes < 1:
        return DraftTree.root_only(newest)
    limit = torch.tensor(budget.depth, device=newest.device)
    frontier = min(nodes, sum(s.width for s in subtrees.shapes))
    timed = None if pace is None or budget.passes is None else (pace, budget.passes[0], budget.node_seconds)
    pool = _expand(levels, heads, subtrees, modality_ids, deepest, limit, frontier, temperature, timed)
    return _merge(_select(pool, subtrees, nodes), newest, nodes, budget.seconds)


def _expand(
    levels: Levels,
    heads: Words,
    subtrees: Subtrees,
    modality_ids: Tensor,
    deepest: int,
    limit: Tensor,
    frontier: int,
    temperature: float | None,
    timed: tuple[Pace, float, float] | None,
) -> _Pool:
    """All candidates down to level `deepest`, `limit` [B] in each row; at most `frontier` nodes a level go on.

    timed: a pace, and the seconds that a token costs without drafting, and a node in every row; levels then end where
    they no longer pay.
    """
    B, M = subtrees.budget.shape
    device = subtrees.budget.device
    widths = torch.tensor([s.width for s in subtrees.shapes], device=device)
    depths = torch.tensor([s.depth for s in subtrees.shapes], device=device)
    k = min(int(max(s.width for s in subtrees.shapes)), len(heads.ids))
    warmth = 1.0 if temperature is None else temperature
    tree = torch.arange(M, device=device).expand(B, -1)  # of each node of the frontier, F = M of them at the root
    score = torch.zeros(B, M, device=device).masked_fill(subtrees.share == 0, NEVER)
    parent, path = torch.full_like(tree, -1), torch.zeros_like(tree)
    laws: Laws = levels.root(subtrees.weights)
    pools: list[_Pool] = []
    offset, before = 0, 1.0
    for level in range(1, deepest + 1):
        size = tree.shape[1] * k
        spread = lambda x: x[..., None].expand(-1, -1, k).flatten(1)  # noqa: E731
        top, index = laws.logits.float().log_softmax(-1).topk(k, -1)  # [B, F, k]
        q = top if warmth == 1.0 else (laws.logits.float() / warmth).log_softmax(-1).gather(-1, index)
        hit = heads.hit(top, laws.sure.float()[..., None]) if temperature is None else q
        worth = score[..., None] + hit - 1e-5  # strictly below the parent's
        allowed = (torch.arange(k, device=device) < widths[tree][..., None]) & (level <= depths[tree])[..., None]
        worth = worth.masked_fill(~(allowed & (level <= limit)[:, None, None]), NEVER).flatten(1)
        tokens = heads.ids[index].flatten(1)
        paths = spread(path) * PRIME + tokens + 1
        kinds = spread(modality_ids[laws.weights.argmax(-1)])
        trees, depth = spread(tree), torch.full_like(tokens, level)
        pools.append(_Pool(tokens, worth, q.exp().flatten(1), trees, spread(parent), depth, kinds, paths))
        if level == deepest:
            break
        order, rank = _ranked(worth, trees, M)
        out = rank >= widths[trees.gather(-1, order)]
        order = order.gather(-1, out.long().argsort(dim=-1, stable=True))[:, : min(frontier, size)]
        score, tree, path = worth.gather(-1, order), trees.gather(-1, order), paths.gather(-1, order)
        score = score.masked_fill(out.sort(dim=-1, stable=True).values[:, : order.shape[1]], NEVER)
        parent, offset = order + offset, offset + size
        if timed is not None:
            pace, token, node = timed
            if level > 1:
                pace.end()
            reach = reached(score, tree, M)
            if not pace.pays(before, reach, token, node):
                break
            before = reach
            pace.begin()
        laws = levels.below(tokens.gather(-1, order), order // k)
    return _Pool.of(pools)


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
        fixed=torch.cat([torch.zeros_like(keep[:, :1]), there], 1),
        height=int(height),
        q=column(pool.q, 1.0, 0.0),
    )
