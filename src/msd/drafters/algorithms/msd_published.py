"""`msd-published`: EAGLE-2's layer with decoupled visual tokens (MSD, arXiv 2505.14260, section 3.2).

At visual positions `fc` is bypassed: the projector's embedding goes straight into the layer, and the target's state
there is dropped. Training is in two stages: text alone, then a share of multimodal samples that rises to one.
"""

from __future__ import annotations

from msd.drafters.registry import learned
from msd.drafters.toolkit.context import Columns, Selection, keep
from msd.drafters.toolkit.levels import EagleNetwork
from msd.train.losses.eagle import eagle_loss


@learned("msd-published", loss=eagle_loss)
class MSDPublished(EagleNetwork):
    """The published loss is EAGLE's, on answer tokens."""

    width = 8
    stages = (0.5, 0.5, 0.0, 0.0)

    def kept(self, c: Columns) -> Selection:
        """All columns, visual ones with the embedding for input."""
        found, order = keep(c, c.real)
        found.fixed, found.given = c.visual.gather(1, order), found.word
        return found
