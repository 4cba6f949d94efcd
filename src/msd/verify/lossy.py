"""The base class of lossy policies: thresholds by modality, and the exact divergence of every emitted token."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from msd.core.modality import LANGUAGE
from msd.core.sampling import Sampler
from msd.core.tree import Accepted, DraftTree, Scores
from msd.verify.builtin.lossless import Lossless
from msd.verify.divergence import total_variation
from msd.verify.rejection import Rule, try_sampled_candidates, walk, without


@dataclass
class Position:
    """R rows of a batch during a walk, each at one node of its tree.

    rows: their indices in the batch. tree: their trees. node: [R]. logits: [R, V], processed. p: [R, V] float64.
    threshold: θ, [R, 1] float64. drafted: [R, V] bool, the tokens of the node's deterministic children. q: [R, V]
    float64, their draft probabilities (1 if the tree has none). distributions: [R, K, V], draft distributions of the
    node's sampled candidates, and present: [R, K] bool, which of them exist; or None.
    """

    tree: DraftTree
    node: Tensor
    logits: Tensor
    p: Tensor
    threshold: Tensor
    rows: list[int]
    drafted: Tensor
    q: Tensor
    distributions: Tensor | None
    present: Tensor | None

    @classmethod
    def at(cls, tree: DraftTree, node: Tensor, logits: Tensor, rows: list[int]) -> Position:
        """The position of `rows` of `tree` at `node`, with θ = 1."""
        tree, p = tree.select(rows), logits.double().softmax(-1)
        drafted = tree.child_tokens(node, p.shape[-1])
        q = torch.ones_like(p)
        if tree.q is not None:  # all nodes but the children write to an extra column, which is dropped
            column = tree.tokens.masked_fill(~tree.children(node), p.shape[-1])
            q = torch.cat([q, q[:, :1]], 1).scatter(1, column, tree.q.double())[:, :-1]
        distributions = present = None
        if tree.candidates is not None:
            index = torch.arange(len(rows), device=node.device)
            present = tree.candidates.child[index, node] >= 0
            distributions = tree.candidates.distributions[index[:, None], tree.candidates.distribution[index, node]]
        return cls(tree, node, logits, p, torch.ones_like(p[:, :1]), rows, drafted, q, distributions, present)

    def follow(self, token: Tensor) -> Tensor:
        """The deterministic child of each row's node that has `token` [R]: [R], -1 for none."""
        return self.tree.follow(self.node, token, self.tree.children(self.node))

    def try_sampled(self, indices: list[int], sampler: Sampler, rule: Rule) -> tuple[Tensor, Tensor]:
        """(token, child) of the R rows at `indices`, after all deterministic candidates were rejected."""
        return try_sampled_candidates(
            self.tree.select(indices), self.node[indices], without(self.p[indices], self.drafted[indices]), sampler,
            [self.rows[i] for i in indices], rule, self.threshold[indices],
        )  # fmt: skip


class Lossy(ABC):
    """A policy whose output may differ in distribution from p; `Accepted.divergence` has the exact distance.

    For greedy decoding it follows the longest argmax path, as `lossless` does.
    """

    routed: ClassVar[bool] = True
    lossless: ClassVar[bool] = False
    calibrated: ClassVar[bool] = False

    def accept(self, tree: DraftTree, scores: Scores, sampler: Sampler) -> Accepted:
        """Walks the trees; also returns the total variation and the modality of every emitted token."""
        divergence: list[list[float]] = [[] for _ in range(tree.batch)]
        if scores.modality is None:
            scores.modality = torch.full_like(tree.tokens, LANGUAGE.id)
        modality = scores.modality
        exact = tree.height == 0 or not sampler.do_sample or self._is_lossless()

        def choose(
            tree: DraftTree, node: Tensor, logits: Tensor, sampler: Sampler, rows: list[int]
        ) -> tuple[Tensor, Tensor]:
            kinds = modality[rows, node].tolist()
            spent = [0.0] * len(rows)
            if exact:
                token, child = Lossless()._choose(tree, node, logits, sampler, rows)
            else:
                position = Position.at(tree, node, logits, rows)
                thresholds = self._choose_thresholds(position, kinds, sampler)
                position.threshold = torch.tensor(thresholds, dtype=torch.float64, device=node.device)[:, None]
                token, child, out = self._emit(position, sampler)
                spent = total_variation(out, position.p).tolist()
                self._record(sampler, rows, kinds, spent)
            for row, tv in zip(rows, spent, strict=True):
                divergence[row].append(tv)
            return token, child

        accepted = walk(tree, scores, sampler, choose)
        accepted.divergence = divergence
        return accepted

    def _is_lossless(self) -> bool:
        """Whether the settings allow no divergence at all."""
        return False

    @abstractmethod
    def _choose_thresholds(self, position: Position, kinds: list[int], sampler: Sampler) -> list[float]:
        """θ of each row, whose modality is in `kinds`. It must not depend on a token that was sampled there."""

    @abstractmethod
    def _emit(self, position: Position, sampler: Sampler) -> tuple[Tensor, Tensor, Tensor]:
        """(token [R], child [R] or -1, output distribution [R, V] float64)."""

    def _record(self, sampler: Sampler, rows: list[int], kinds: list[int], spent: list[float]) -> None:  # noqa: B027
        """Records the total variation of the tokens just emitted."""
