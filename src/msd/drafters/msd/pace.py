"""Whether another level of a draft pays: its cost is measured while drafting, its worth follows from the scores."""

from __future__ import annotations

import time

import torch.nn.functional as F
from torch import Tensor

MEMORY = 0.9  # of the running mean


class Pace:
    """Running mean of the seconds that a level takes here."""

    def __init__(self) -> None:
        self.level, self._begun = 0.0, 0.0

    def begin(self) -> None:
        """A level begins."""
        self._begun = time.perf_counter()

    def end(self) -> None:
        """It is done."""
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
