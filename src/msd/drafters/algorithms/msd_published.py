"""`msd-published`: EAGLE-2's layer with decoupled visual tokens (MSD, arXiv 2505.14260, section 3.2).

Visual positions bypass `fc`: the projector's embedding is the input of the layer, and the target's state is dropped.
Training has two stages: text alone, then a share of multimodal samples that rises to one.
"""

from __future__ import annotations

from msd.drafters.registry import learned
from msd.drafters.toolkit.context import Columns, Selection, select_columns
from msd.drafters.toolkit.levels import EagleNetwork
from msd.train.losses.published import eagle_loss


@learned("msd-published", loss=eagle_loss)
class MSDPublished(EagleNetwork):
    """The published loss is EAGLE's, on answer tokens."""

    width = 8
    stages = (0.5, 0.5, 0.0, 0.0)

    def select_columns(self, c: Columns) -> Selection:
        """Selects all columns; visual ones have the embedding as input."""
        selection, order = select_columns(c, c.real)
        selection.fixed, selection.given = c.visual.gather(1, order), selection.embedding
        return selection
