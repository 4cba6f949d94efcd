"""Grows draft trees: the levels on the device, then one look of the host at all candidates.

A drafter computes its distributions level by level (`Levels`). The device keeps each level's candidates and chooses the
next frontier among them. When all levels are computed, the host reads the candidates in one transfer and chooses the
nodes (`msd.drafters.toolkit.selection`). How many levels are computed is decided before, from the drafts so far
(`msd.drafters.toolkit.level_cost`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from msd.core.foresight import Outlook
from msd.core.tree import DraftTree
from msd.core.trust import scale
from msd.drafters.toolkit.chance import Correction, NodeFeatures, RankedFeatures, corrected
from msd.drafters.toolkit.context import pick
from msd.drafters.toolkit.level_cost import LevelCost
from msd.drafters.toolkit.selection import NEVER, Candidates, Node, best_nodes, best_size, choose
from msd.planning.plan import Budget

STEP = -1e-5  # added to the score of a child, which must be below that of its parent


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
    """M subtrees in each of B rows, which share a row's nodes.

    weights: [B, M, experts], modality weights of the first distribution. share: [B, M], in proportion to the nodes of
    each subtree, 0 where a row does not have it. shapes: M of them.
    """

    weights: Tensor
    share: Tensor
    shapes: list[Shape]

    @classmethod
    def single(cls, newest: Tensor, shape: Shape) -> Subtrees:
        """One subtree below each of the roots `newest` [B]."""
        one = torch.ones(len(newest), 1, device=newest.device)
        return cls(one[..., None], one, [shape])


def descend(
    levels: Levels, weights: Tensor, depth: int, expand: Callable[[Distributions, int], tuple[Tensor, Tensor]]
) -> None:
    """Calls `expand(distributions, level)` for levels 1 to `depth`.

    `expand` returns the next frontier and its parents in the last one, both [B, F] (see `Levels.below`).
    """
    distributions = levels.root(weights)
    for level in range(1, depth + 1):
        frontier = expand(distributions, level)
        if level < depth:
            distributions = levels.below(*frontier)


def grow(
    levels: Levels,
    vocabulary: DraftVocabulary,
    subtrees: Subtrees,
    modality_ids: Sequence[int],
    newest: Tensor,
    budget: Budget,
    outlook: Callable[[int], Outlook | None] | None = None,
    cost: LevelCost | None = None,
) -> DraftTree:
    """Grows trees of at most `budget.nodes` draft nodes; the tree of row b is at most `budget.depth[b]` levels deep.

    With `budget.seconds`, the number of nodes maximises expected tokens per second; with `cost`, only levels that pay
    are computed. modality_ids: registry ids of the experts. newest: [B], the roots. outlook: on some number of draws,
    for requests that sample (`Sampler.outlook`); where their noise is unknown, the uncorrected chance of a node is q.
    """
    deepest = min(max(budget.depth, default=0), max(s.depth for s in subtrees.shapes))
    if deepest < 1 or budget.nodes < 1:
        return DraftTree.root_only(newest)
    measured = cost if budget.passes is not None else None
    if measured is not None and budget.passes is not None:
        deepest = measured.levels(deepest, budget.passes[0], budget.node_seconds)
    growth = _Growth(vocabulary, subtrees, budget, None if outlook is None else outlook(deepest))
    descend(levels, subtrees.weights, deepest, growth.expand)
    rows = growth.read()
    seconds = time.perf_counter() - growth.started
    nodes = [choose(row, share, budget.nodes) for row, share in rows]
    if budget.seconds is not None:
        size = best_size([[math.exp(n.score) for n in row] for row in nodes], budget.seconds)
        nodes = [best_nodes(row, size) for row in nodes]
    if measured is not None:
        measured.learn(expected_tokens(nodes, deepest), seconds)
    return _tree(newest, nodes, modality_ids)


def expected_tokens(rows: Sequence[Sequence[Node]], levels: int) -> list[float]:
    """The mean over rows of the expected accepted nodes of each level."""
    out = [0.0] * levels
    for row in rows:
        for node in row:
            out[node.depth - 1] += math.exp(node.score) / len(rows)
    return out


def _tree(newest: Tensor, rows: Sequence[Sequence[Node]], modality_ids: Sequence[int]) -> DraftTree:
    """Builds one tree per row from its nodes."""
    kind = [[modality_ids[max(range(len(n.weights)), key=n.weights.__getitem__)] for n in row] for row in rows]
    tokens, parents, q = ([[getattr(n, name) for n in row] for row in rows] for name in ("token", "parent", "q"))
    tree = DraftTree.from_lists(newest, tokens, parents, modality=kind, q=q)
    tree.forecast = [[(node.parent, node.chance) for node in row] for row in rows]
    return tree


@lru_cache(maxsize=64)
def _limits(shapes: tuple[Shape, ...], deepest: tuple[int, ...], children: int, device: torch.device) -> Tensor:
    """What to add to a child's score: [levels, B, M, children], `NEVER` beyond a subtree's shape or a row's depth."""

    def limit(shape: Shape, level: int, most: int, rank: int) -> float:
        return STEP if rank < shape.width and level <= min(shape.depth, most) else NEVER

    levels = range(1, 1 + max(deepest))
    table = [
        [[[limit(s, level, most, rank) for rank in range(children)] for s in shapes] for most in deepest]
        for level in levels
    ]
    return torch.tensor(table, device=device)


@lru_cache(maxsize=64)
def _places(widths: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns (subtree indices [M, 1, 1], what to add to a subtree's r-th best candidate [M, W])."""
    table = [[0.0 if rank < width else NEVER for rank in range(max(widths))] for width in widths]
    return torch.arange(len(widths), device=device)[:, None, None], torch.tensor(table, device=device)


class _Growth:
    """The growing candidates of one step (see `grow`). Tensors [B, F] describe the frontier; at the root F = M."""

    def __init__(
        self, vocabulary: DraftVocabulary, subtrees: Subtrees, budget: Budget, outlook: Outlook | None
    ) -> None:
        self.vocabulary, self.outlook, self.ids = vocabulary, outlook, vocabulary.ids
        self.handicaps = () if outlook is None else outlook.handicaps(self.ids)  # of each level
        shapes, self.share, self.device = tuple(subtrees.shapes), subtrees.share, subtrees.share.device
        self.widths = tuple(s.width for s in shapes)
        self.children = min(max(self.widths), len(self.ids), budget.nodes)
        self.widest, self.nodes = min(budget.nodes, sum(self.widths)), budget.nodes
        self.limits = _limits(shapes, tuple(budget.depth), self.children, self.device)
        self.score = (self.share == 0) * NEVER
        self.subtree: Tensor | None = None  # [B, F]; None at the root, or if there is only one
        self.candidates: list[tuple[Tensor, ...]] = []  # of each level: score, log q, token [B, F*k], weights [B, F*E]
        self.frontiers: list[Tensor] = []  # the candidates [B, F] of a level that the next one expands
        self.started = 0.0  # end of the first level
        self.correction: Correction | None = None
        if budget.shift is not None:
            both = torch.tensor([[scale(s) for s in budget.shift], budget.shift], device=self.device)
            self.correction = Correction(*both[..., None, None])

    def expand(self, distributions: Distributions, level: int) -> tuple[Tensor, Tensor]:
        """Adds the most likely children of every frontier node; returns the next frontier and its parents."""
        logits, limit = distributions.logits.float(), self.limits[level - 1]
        if self.outlook is not None:
            logits = self.outlook.warp(logits)
            logits = logits - self.handicaps[level - 1] if self.handicaps else logits
        log_q, index = logits.log_softmax(-1).topk(self.children, -1)  # [B, F, k]
        node = RankedFeatures(log_q, distributions.confidence.float()[..., None], log_q[..., :1], self.correction)
        known = self.outlook is None or self.outlook.noise is not None
        chance = self.vocabulary.log_acceptance(node) if known else corrected(log_q, self.correction)
        if self.subtree is not None:
            limit = pick(limit, self.subtree)
        score = (self.score[..., None] + chance + limit).flatten(1)
        tokens = self.ids[index.flatten(1)]
        self.candidates.append((score, log_q.flatten(1), tokens, distributions.weights.flatten(1)))
        order = self._advance(score, level)
        if level == 1:
            self.started = time.perf_counter()
        return tokens.gather(1, order), order // self.children

    def _advance(self, score: Tensor, level: int) -> Tensor:
        """Makes the best candidates [B, F*k] of the newest level the frontier; returns their indices [B, F].

        If a node below a frontier node at this level is chosen, so are all candidates of the level that are as good as
        the frontier node, its ancestors, and it. A subtree therefore has at most `nodes - level` such frontier nodes.
        """
        width = max(1, min(self.widest, len(self.widths) * (self.nodes - level)))
        if len(self.widths) == 1:
            best, order = (x[:, :width] for x in score.sort(dim=-1, descending=True, stable=True))
        else:
            which, rank = _places(self.widths, self.device)
            subtree = which[:, 0, 0].expand(len(score), -1) if self.subtree is None else self.subtree
            own = subtree[:, None, :, None] == which  # [B, M, F, 1]
            mine = torch.where(own, score.view(len(score), 1, -1, self.children), NEVER).flatten(2)
            best, order = (x[..., : rank.shape[1]] for x in mine.sort(dim=-1, descending=True, stable=True))
            each = best.shape[-1]
            best, place = (best + rank[:, :each]).flatten(1).sort(dim=-1, descending=True, stable=True)
            best, place = best[:, :width], place[:, :width]
            order, self.subtree = order.flatten(1).gather(1, place), place // each
        self.score = best
        self.frontiers.append(order)
        return order

    def read(self) -> list[tuple[Candidates, list[float]]]:
        """Reads everything in one transfer; returns (candidates, share of each subtree) of each row."""
        del self.frontiers[len(self.candidates) - 1 :]  # nothing is below the last level
        fields = list(zip(*self.candidates, strict=True))
        parts = [self.share, *(x for field in fields for x in field), *self.frontiers]
        table = torch.cat(parts, 1).tolist()  # token ids below 2**24 are exact in float32
        sizes = [x.shape[1] for x in fields[0]]
        M, P, W = len(self.widths), sum(sizes), sum(x.shape[1] for x in fields[3])
        cuts = list(pairwise([M, M + P, M + 2 * P, M + 3 * P, M + 3 * P + W, None]))
        return [(Candidates(self.children, sizes, *(row[a:b] for a, b in cuts)), row[:M]) for row in table]
