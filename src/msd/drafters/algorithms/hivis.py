"""`hivis`: the drafter sees no visual token, only the target's states at text positions (HiViS, arXiv 2509.23928).

Image positions are removed and text positions are counted without them. Image content reaches the drafter through the
target's last states. A learned residual per level corrects the bias of the draft's own states relative to the target's;
training feeds the drafter its own states.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from msd.drafters.registry import learned
from msd.drafters.toolkit.context import Columns, Selection, select_columns
from msd.drafters.toolkit.levels import EagleNetwork
from msd.drafters.toolkit.network import NetworkConfig
from msd.train.losses.published import eagle_loss


@learned("hivis", loss=eagle_loss)
class HiViS(EagleNetwork):
    """EAGLE-2's layer over text alone; the loss is EAGLE's, on every level of a self-fed draft."""

    reach = 4

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        self.residual = nn.Parameter(torch.zeros(self.reach, config.hidden))

    def select_columns(self, c: Columns) -> Selection:
        """Selects text columns, at the positions that they would have without images."""
        selection, order = select_columns(c, c.real & ~c.visual)
        removed = c.visual.long().cumsum(1)
        selection.positions = (c.positions - removed).gather(1, order)
        selection.shift = -removed[:, -1:]
        return selection

    def entry(self, feature: Tensor, embedding: Tensor, image: Tensor, level: int) -> Tensor:
        """fc([emb; h + r_level])."""
        return super().entry(feature + self.residual[min(level, self.reach - 1)], embedding, image, level)
