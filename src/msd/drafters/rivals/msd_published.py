"""`msd-published`: EAGLE-2's layer with decoupled visual tokens (MSD, arXiv 2505.14260, section 3.2).

At visual positions `fc` is bypassed: the projector's embedding goes straight into the layer, and the target's state
there is dropped. Training is in two stages: text alone, then a share of multimodal samples that rises to one.
"""

from __future__ import annotations

from msd.drafters.rivals.eagle2 import Eagle2
from msd.drafters.rivals.entries import Columns, Entries, keep


class MSDPublished(Eagle2):
    """The published loss is EAGLE's, on answer tokens."""

    method = "msd-published"
    width = 8
    stages = (0.5, 0.5, 0.0, 0.0)

    def kept(self, c: Columns) -> Entries:
        """All columns, visual ones with the embedding for input."""
        found, order = keep(c, c.real)
        found.fixed, found.given = c.visual.gather(1, order), found.word
        return found
