"""`hivis`: the drafter sees no visual token, only the target's states at text positions (HiViS, arXiv 2509.23928).

Image positions are left out, so that the drafter's text is as long as its words and its positions count these alone.
What the image says reaches it through the target's last states. A learned residual per level corrects the bias of a
draft's own states, which the target's states do not have; training feeds the drafter its own states.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from msd.drafters.rivals.config import RivalConfig
from msd.drafters.rivals.eagle2 import Eagle2
from msd.drafters.rivals.entries import Columns, Entries, keep
from msd.drafters.rivals.network import Parts
from msd.drafters.rivals.teaching import Truth, eagle_terms
from msd.targets.teacher import Lesson


class HiViS(Eagle2):
    """EAGLE-2's layer over words alone."""

    method = "hivis"
    roots = 24
    reach = 4
    options: ClassVar[dict[str, float]] = {"noise": 0.1}

    def __init__(self, config: RivalConfig) -> None:
        super().__init__(config)
        self.residual = nn.Parameter(torch.zeros(self.reach, config.hidden))

    def kept(self, c: Columns) -> Entries:
        """Text columns, at the places they would have without images."""
        found, order = keep(c, c.real & ~c.visual)
        hidden = c.visual.long().cumsum(1)
        found.positions = (c.positions - hidden).gather(1, order)
        found.shift = -hidden[:, -1:]
        return found

    def entry(self, feature: Tensor, word: Tensor, image: Tensor, level: int) -> Tensor:
        """fc([emb; h + r_level])."""
        return super().entry(feature + self.residual[min(level, self.reach - 1)], word, image, level)

    def loss(self, lesson: Lesson, first: Tensor) -> tuple[Tensor, Parts]:
        """EAGLE's, on every level of a self-fed draft."""
        states = self.states(lesson, first, self.reach)
        return eagle_terms(states, self.head(states), Truth.of(lesson, first, self.reach, self.config.hidden))
