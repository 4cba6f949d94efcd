"""`vispec`: an image as one compressed token and a global vector (ViSpec, arXiv 2509.15235, section 3).

Two learned queries attend to an image's embeddings. The result of the first is the layer's input at the image's last
position, bypassing `fc`. The result of the second, g, enters every later text position: its feature is img_fc([h; g])
[2H -> H], which is initialised to h. Text keeps its positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msd.backends.packed import Linear
from msd.drafters.registry import learned
from msd.drafters.toolkit.context import Columns, Images, Selection, select_columns
from msd.drafters.toolkit.layers import Adaptor
from msd.drafters.toolkit.levels import EagleNetwork
from msd.train.losses.published import vispec_loss


@learned("vispec", loss=vispec_loss)
class ViSpec(EagleNetwork):
    """With several images, g is that of the last image before a position; adjacent images count as one."""

    width, depth = 8, 4  # the released code's depth of 3 counts the levels below the first
    stages = (0.3, 0.0, 1.0, 0.0)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        H = config.hidden
        self.adaptor = Adaptor(H, config.heads, 2, config.variant.qkv_bias)
        self.img_fc = Linear(2 * H, H, bias=config.variant.fc_bias)
        with torch.no_grad():
            self.img_fc.weight.copy_(torch.eye(H, 2 * H))
            if self.img_fc.bias is not None:
                self.img_fc.bias.zero_()

    def select_columns(self, c: Columns) -> Selection:
        """Selects the text columns and the last column of every image."""
        images = Images.of(c.visual, c.embedding)
        if images is None:
            return select_columns(c, c.real)[0]
        adapted = self.adaptor(images.states, images.mask)
        selection, order = images.replaced(c, adapted[:, :1], [1] * len(images.spans))
        before = torch.zeros_like(c.visual, dtype=torch.long)  # images before a column, counted over the whole batch
        for i, (row, _, end) in enumerate(images.spans):
            before[row, end:] = i + 1
        selection.image = torch.cat([torch.zeros_like(adapted[:1, 1]), adapted[:, 1]])[before.gather(1, order)]
        return selection

    def entry(self, feature: Tensor, embedding: Tensor, image: Tensor, level: int) -> Tensor:
        """fc([emb; img_fc([h; g])])."""
        feature = self.img_fc(torch.cat([feature, image.expand_as(feature)], -1))
        return super().entry(feature, embedding, image, level)
