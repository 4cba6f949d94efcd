"""`eagle2`: one decoder layer over [emb(y_{i+1}); h_i] (EAGLE-2, arXiv 2406.16858; the layer is EAGLE's, 2401.15077).

x_i = fc([emb; h]) with bias, a layer without a norm before its attention, the target's frozen embedding and output
layer. The tree is dynamic: k children of each of k frontier nodes a level, the k likeliest go on, and the likeliest of
all nodes are kept, a parent before its child.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from msd.backends.packed import Linear
from msd.drafters.msd.layer import Layer
from msd.drafters.rivals.autoregressive import Autoregressive
from msd.drafters.rivals.config import RivalConfig
from msd.drafters.rivals.layers import BareLayer
from msd.drafters.rivals.network import Parts
from msd.drafters.rivals.teaching import Truth, eagle_terms
from msd.targets.teacher import Lesson


class Eagle2(Autoregressive):
    """Blind to modality: image positions are positions like any other, with the projector's output as embedding."""

    method = "eagle2"
    layer: ClassVar[type[Layer]] = BareLayer
    options: ClassVar[dict[str, float]] = {"noise": 0.1}

    def __init__(self, config: RivalConfig) -> None:
        super().__init__(config)
        self.fc = Linear(2 * config.hidden, config.hidden, bias=True)

    def entry(self, feature: Tensor, word: Tensor, image: Tensor, level: int) -> Tensor:
        """fc([emb; h])."""
        out: Tensor = self.fc(torch.cat([word, feature], -1))
        return out.to(self.dtype)  # what layers add up keeps the weights' precision under autocast

    def loss(self, lesson: Lesson, first: Tensor) -> tuple[Tensor, Parts]:
        """SmoothL1 + 0.1 × cross entropy, one step ahead."""
        states = self.states(lesson, first, 1)
        return eagle_terms(states, self.head(states), Truth.of(lesson, first, 1, self.config.hidden))
