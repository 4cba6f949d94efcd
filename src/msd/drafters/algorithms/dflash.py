"""`dflash`: a block of masks filled in one pass (DFlash, arXiv 2602.06036).

The root's embedding and B-1 masks go through a few layers; a mask's state, through the target's frozen output layer,
gives the distribution of the token it stands for. Blind to modality.
"""

from __future__ import annotations

from msd.drafters.registry import learned
from msd.drafters.toolkit.levels import Block
from msd.train.losses.block import dflash_loss


@learned("dflash", loss=dflash_loss)
class DFlash(Block):
    """Seven drafted tokens."""

    width, depth = 8, 7
    offset = 0
