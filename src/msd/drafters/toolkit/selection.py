"""Chooses the nodes of a draft tree among the candidates of all levels, on the host.

The candidates of a row are the children of its frontiers. Each subtree keeps its candidates of highest score within its
budget; equal paths of several subtrees become one node. Scores are log-probabilities that the whole path to a candidate
is the target's choice, and a candidate's score is below that of its parent.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

LITTLE = 1.1  # times the seconds of a step without nodes: where one node takes no longer, it is always tried
NEVER = -1e30  # score of a candidate that must not become a node


@dataclass
class Node:
    """A chosen node. parent: number of its parent; the root is number 0, the first chosen node number 1.

    depth: 1 below the root. weights: modality weights of its distribution. score: log-probability of its whole path.
    chance: of the node, given its parent.
    """

    token: int
    parent: int
    depth: int
    q: float
    weights: Sequence[float]
    score: float
    chance: float


@dataclass
class Candidates:
    """The candidates of one row: level after level, frontier node after frontier node, `children` each.

    sizes: candidates of each level. scores, log_q, tokens: of each candidate. weights: the modality weights of each
    frontier node, one after the other. frontiers: of each frontier node below the root's, the candidate that it is, an
    index within its level.
    """

    children: int
    sizes: list[int]
    scores: list[float]
    log_q: list[float]
    tokens: list[float]
    weights: list[float]
    frontiers: list[float]

    def __post_init__(self) -> None:
        self._first = [sum(self.sizes[:level]) for level in range(len(self.sizes))]
        self._roots = self.sizes[0] // self.children  # frontier nodes at the root
        self._experts = len(self.weights) * self.children // len(self.scores)

    def level(self, candidate: int) -> int:
        """The level of a candidate, from 0."""
        return bisect_right(self._first, candidate) - 1

    def parent(self, candidate: int) -> int:
        """The candidate above, -1 for the root."""
        level, node = self.level(candidate), candidate // self.children - self._roots
        return -1 if level == 0 else self._first[level - 1] + int(self.frontiers[node])

    def weights_of(self, candidate: int) -> list[float]:
        """The modality weights of the distribution that a candidate comes from."""
        at = candidate // self.children * self._experts
        return self.weights[at : at + self._experts]

    def subtrees(self) -> list[int]:
        """The subtree of each candidate; the first frontier has one node for each."""
        out: list[int] = []
        for candidate in range(0, len(self.scores), self.children):
            parent = self.parent(candidate)
            out += [candidate // self.children if parent < 0 else out[parent]] * self.children
        return out


def budgets(share: Sequence[float], nodes: int) -> list[int]:
    """Divides `nodes` in proportion to the shares of the subtrees; the largest remainders are rounded up."""
    exact = [s / sum(share) * nodes for s in share]
    out = [math.floor(x) for x in exact]
    by_remainder = sorted(range(len(share)), key=lambda m: exact[m] - out[m] if share[m] else -1.0, reverse=True)
    for m in by_remainder[: nodes - sum(out)]:
        out[m] += 1
    return out


def _by_priority(candidates: Candidates, share: Sequence[float], nodes: int) -> list[int]:
    """Orders candidates by score: those within their subtree's budget, then others, which fill what merging frees."""
    scores, M = candidates.scores, len(share)
    if M == 1:
        return sorted(range(len(scores)), key=scores.__getitem__, reverse=True)[:nodes]
    subtree, left, total = candidates.subtrees(), budgets(share, nodes), sum(share)
    bias = [math.log(s / total) if s else 0.0 for s in share]
    weighted = [score + bias[m] for score, m in zip(scores, subtree, strict=True)]
    within: list[int] = []
    over: list[int] = []
    for c in sorted(range(len(scores)), key=weighted.__getitem__, reverse=True):
        if scores[c] <= NEVER / 2:
            break
        m = subtree[c]
        (within if left[m] > 0 else over).append(c)
        left[m] -= 1
    return (within + over)[: M * nodes]


def choose(candidates: Candidates, share: Sequence[float], nodes: int) -> list[Node]:
    """Chooses at most `nodes` distinct paths; a parent precedes its children.

    share: of each subtree, 0 where the row does not have it. Of equal paths the first counts, and the highest score.
    """
    chosen: list[Node] = []
    number: dict[tuple[int, int], int] = {}  # (parent, token) -> node
    node_of = {-1: 0}  # candidate -> node
    for c in _by_priority(candidates, share, nodes):
        above, score = candidates.parent(c), candidates.scores[c]
        parent = node_of.get(above)
        if parent is None or score <= NEVER / 2:
            continue
        token = int(candidates.tokens[c])
        known = number.get((parent, token))
        if known is not None:
            node_of[c], chosen[known - 1].score = known, max(score, chosen[known - 1].score)
        elif len(chosen) < nodes:
            q, weights = math.exp(candidates.log_q[c]), candidates.weights_of(c)
            chance = math.exp(min(0.0, score - (candidates.scores[above] if above >= 0 else 0.0)))
            chosen.append(Node(token, parent, candidates.level(c) + 1, q, weights, score, chance))
            node_of[c] = number[parent, token] = len(chosen)
    return chosen


def best_size(chances: Sequence[Sequence[float]], seconds: Sequence[float]) -> int:
    """Returns the number of nodes, equal for all rows, that maximises expected tokens per second.

    chances: of each row, the probabilities that its nodes are accepted. seconds[n]: of a step with n nodes. A row
    without nodes has finished and emits nothing. It is at least 1 where one node costs little, since the draft has been
    made, and a draft that is not tried teaches nothing.
    """
    ranked = [sorted(row, reverse=True) for row in chances if row]
    expected, best, rate = float(len(ranked)), 0, len(ranked) / seconds[0]
    if len(seconds) > 1 and seconds[1] < LITTLE * seconds[0]:
        best, rate = 1, (expected + sum(row[0] for row in ranked)) / seconds[1]
    for n in range(1, min(len(seconds), 1 + max(map(len, ranked), default=0))):
        expected += sum(row[n - 1] for row in ranked if len(row) >= n)
        if expected / seconds[n] > rate:
            best, rate = n, expected / seconds[n]
    return best


def best_nodes(nodes: list[Node], count: int) -> list[Node]:
    """Returns the `count` nodes of highest score in their order; a parent has a higher score than its children."""
    if len(nodes) <= count:
        return nodes
    ranked = sorted(range(len(nodes)), key=lambda i: nodes[i].score, reverse=True)
    kept = sorted(ranked[:count])
    number = {0: 0} | {old + 1: new for new, old in enumerate(kept, 1)}
    out = [nodes[i] for i in kept]
    for node in out:
        node.parent = number[node.parent]
    return out
