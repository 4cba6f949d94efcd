"""`vispec`: an image as one compressed token and a global vector (ViSpec, arXiv 2509.15235, section 3).

Two learned queries attend to an image's embeddings. What the first gives stands at the image's last position, past
`fc`; what the second gives, g, tells every later text position of the image: its feature is img_fc([h; g]) [2H -> H],
which begins as h. Text keeps its positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msd.backends.packed import Linear
from msd.drafters.registry import learned
from msd.drafters.toolkit.context import Columns, Images, Selection, keep, pick
from msd.drafters.toolkit.layers import Adaptor
from msd.drafters.toolkit.levels import EagleNetwork
from msd.train.losses.eagle import vispec_loss


@learned("vispec", loss=vispec_loss)
class ViSpec(EagleNetwork):
    """With several images, text knows of the one before it; images side by side are one."""

    width, depth = 8, 3
    stages = (0.3, 0.0, 1.0, 0.0)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        H = config.hidden
        self.adaptor = Adaptor(H, config.heads, 2)
        self.img_fc = Linear(2 * H, H, bias=True)
        with torch.no_grad():
            self.img_fc.weight.copy_(torch.eye(H, 2 * H))
            self.img_fc.bias.zero_()

    def kept(self, c: Columns) -> Selection:
        """Text, and the last column of every image."""
        images = Images.of(c.visual, c.word)
        stay, given, seen = c.real & ~c.visual, torch.zeros_like(c.word), torch.zeros_like(c.word)
        if images.places:
            adapted = self.adaptor(images.states, images.mask)
            rows, at, which = images.last([1] * len(images.places))
            stay, given = (
                stay.index_put((rows, at), stay.new_ones(())),
                given.index_put((rows, at), adapted[which[:, 0], 0]),
            )
            before = torch.zeros_like(stay, dtype=torch.long)  # images before a column, counted over the whole batch
            for i, (row, _, end) in enumerate(images.places):
                before[row, end:] = i + 1
            seen = torch.cat([torch.zeros_like(adapted[:1, 1]), adapted[:, 1]])[before]
        found, order = keep(c, stay)
        found.fixed, found.given, found.image = c.visual.gather(1, order), pick(given, order), pick(seen, order)
        return found

    def entry(self, feature: Tensor, word: Tensor, image: Tensor, level: int) -> Tensor:
        """fc([emb; img_fc([h; g])])."""
        told = self.img_fc(torch.cat([feature, image.expand_as(feature)], -1))
        return super().entry(told, word, image, level)
