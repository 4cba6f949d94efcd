"""`hivis`: the drafter sees no visual token, only the target's states at text positions (HiViS, arXiv 2509.23928).

Image positions are left out, so that the drafter's text is as long as its words and its positions count these alone.
What the image says reaches it through the target's last states. A learned residual per level corrects the bias of a
draft's own states, which the target's states do not have; training feeds the drafter its own states.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from msd.drafters.registry import learned
from msd.drafters.toolkit.context import Columns, Selection, keep
from msd.drafters.toolkit.levels import EagleNetwork
from msd.drafters.toolkit.network import NetworkConfig
from msd.train.losses.eagle import eagle_loss


@learned("hivis", loss=eagle_loss)
class HiViS(EagleNetwork):
    """EAGLE-2's layer over words alone; the loss is EAGLE's, on every level of a self-fed draft."""

    roots = 24
    reach = 4

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        self.residual = nn.Parameter(torch.zeros(self.reach, config.hidden))

    def kept(self, c: Columns) -> Selection:
        """Text columns, at the places they would have without images."""
        found, order = keep(c, c.real & ~c.visual)
        hidden = c.visual.long().cumsum(1)
        found.positions = (c.positions - hidden).gather(1, order)
        found.shift = -hidden[:, -1:]
        return found

    def entry(self, feature: Tensor, word: Tensor, image: Tensor, level: int) -> Tensor:
        """fc([emb; h + r_level])."""
        return super().entry(feature + self.residual[min(level, self.reach - 1)], word, image, level)
