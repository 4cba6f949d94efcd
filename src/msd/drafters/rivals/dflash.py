"""`dflash`: a block of masks filled in one pass (DFlash, arXiv 2602.06036).

The root's embedding and B-1 masks go through a few layers; a mask's state, through the target's frozen output layer,
is the law of the token it stands for. Blind to modality.
"""

from __future__ import annotations

import torch
from torch import Tensor

from msd.drafters.rivals.block import Block
from msd.drafters.rivals.network import Parts
from msd.drafters.rivals.teaching import Truth, hard_entropy
from msd.targets.teacher import Lesson

DECAY = 4.0  # of a position's weight in training, exp(-k/4), as released for blocks of 7


class DFlash(Block):
    """Seven drafted tokens."""

    method = "dflash"
    width, depth = 8, 7
    ahead = 0

    def loss(self, lesson: Lesson, first: Tensor) -> tuple[Tensor, Parts]:
        """Cross entropy to the answer's tokens, nearer ones weighing more."""
        D = self.config.depth
        truth = Truth.of(lesson, first, D, self.config.hidden)
        logits = self.head(self.states(lesson, first, D))
        weight = torch.exp(-torch.arange(D, device=first.device) / DECAY)
        loss = truth.mean(hard_entropy(logits, truth.token), weight)
        return loss, {"entropy": loss}
