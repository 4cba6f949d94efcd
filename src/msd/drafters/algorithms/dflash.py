"""`dflash`: fills a block of masks in one pass (DFlash, arXiv 2602.06036).

The root's embedding and B-1 masks go through a few layers. The target's frozen output layer maps the state of each mask
to the distribution of the token in its place. Ignores modality.
"""

from __future__ import annotations

from msd.drafters.registry import learned
from msd.drafters.toolkit.levels import Block
from msd.train.losses.published import dflash_loss


@learned("dflash", loss=dflash_loss)
class DFlash(Block):
    """Drafts seven tokens per pass."""

    width, depth = 8, 7
    offset = 0
