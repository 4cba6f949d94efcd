"""What `threshold` and `budget` share: θ by modality, and an exact account of every emitted position."""

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
from msd.verify.rejection import walk


@dataclass
class Position:
    """R rows of a walk, each at one node, over the vocabulary.

    tree: those rows' trees. node: [R]. logits: [R, V] processed. p: [R, V] float64. theta: [R, 1] float64.
    drafted: [R, V] bool, tokens of the node's deterministic children. q: [R, V] float64, their draft probabilities (1
    where the tree has none). distributions: [R, K, V] of its sampled trials, present: [R, K]; or None.
    """

    tree: DraftTree
    node: Tensor
    logits: Tensor
    p: Tensor
    theta: Tensor
    rows: list[int]
    drafted: Tensor
    q: Tensor
    distributions: Tensor | None
    present: Tensor | None

    @classmethod
    def at(cls, tree: DraftTree, node: Tensor, logits: Tensor, rows: list[int]) -> Position:
        """The position of `rows` of `tree` at `node`; its θ is 1, to be set."""
        view, p = tree.of(rows), logits.double().softmax(-1)
        below = (view.parents == node[:, None]) & view.valid
        below = below if view.candidates is None else below & view.fixed
        q = torch.ones_like(p)
        if view.q is not None:  # nodes that are not children write into a last column, which is cut off
            at = view.tokens.masked_fill(~below, p.shape[-1])
            q = torch.cat([q, q[:, :1]], 1).scatter(1, at, view.q.double())[:, :-1]
        drafted = torch.zeros_like(p).scatter_add_(1, view.tokens, below.to(p.dtype)) > 0
        distributions = present = None
        if view.candidates is not None:
            each = torch.arange(len(rows), device=node.device)
            present = view.candidates.child[each, node] >= 0
            distributions = view.candidates.distributions[each[:, None], view.candidates.distribution[each, node]]
        return cls(view, node, logits, p, torch.ones_like(p[:, :1]), rows, drafted, q, distributions, present)

    def tree_of(self, some: list[int]) -> DraftTree:
        """The trees of some of the R rows."""
        return self.tree.of(some)


class Lossy(ABC):
    """A policy that may depart from p, and says by how much: `Accepted.divergence` is exact (see `divergence.py`).

    At temperature 0 it walks the longest argmax path, as `lossless` does.
    """

    routed: ClassVar[bool] = True
    lossless: ClassVar[bool] = False
    calibrated: ClassVar[bool] = False

    def accept(self, tree: DraftTree, scores: Scores, sampler: Sampler) -> Accepted:
        """The walk, with total variation and modality of every emitted token."""
        divergence: list[list[float]] = [[] for _ in range(tree.batch)]
        if scores.modality is None:
            scores.modality = torch.full_like(tree.tokens, LANGUAGE.id)
        modality = scores.modality
        exact = tree.height == 0 or not sampler.do_sample or self._is_lossless()

        def choose(
            tree: DraftTree, node: Tensor, logits: Tensor, sampler: Sampler, rows: list[int]
        ) -> tuple[Tensor, Tensor]:
            kind = modality[rows, node].tolist()
            spent = [0.0] * len(rows)
            if exact:
                token, child = Lossless()._choose(tree, node, logits, sampler, rows)
            else:
                at = Position.at(tree, node, logits, rows)
                theta = self._theta(at, kind, sampler)
                at.theta = torch.tensor(theta, dtype=torch.float64, device=node.device)[:, None]
                token, child, out = self._emit(at, sampler)
                spent = total_variation(out, at.p).tolist()
                self._learn(sampler, rows, kind, spent)
            for row, tv in zip(rows, spent, strict=True):
                divergence[row].append(tv)
            return token, child

        accepted = walk(tree, scores, sampler, choose)
        accepted.divergence = divergence
        return accepted

    def _is_lossless(self) -> bool:
        """Whether the settings leave nothing to depart with."""
        return False

    @abstractmethod
    def _theta(self, at: Position, kinds: list[int], sampler: Sampler) -> list[float]:
        """θ of each row's position, of modality `kinds`; it must not depend on what was drawn there."""

    @abstractmethod
    def _emit(self, at: Position, sampler: Sampler) -> tuple[Tensor, Tensor, Tensor]:
        """(token [R], child [R] or -1, output law [R, V] float64)."""

    def _learn(self, sampler: Sampler, rows: list[int], kinds: list[int], spent: list[float]) -> None:  # noqa: B027
        """Takes note of the total variation of the positions just emitted."""
