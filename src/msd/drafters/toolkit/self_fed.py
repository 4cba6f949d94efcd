"""Drafting level by level: a draft's own state stands for the target state that is not known yet.

EAGLE (Li et al. 2024, arXiv 2401.15077, section 4.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from msd.backends.packed import Linear
from msd.drafters.toolkit.context import Anchors, pick
from msd.drafters.toolkit.growth import Distributions, Levels
from msd.drafters.toolkit.layers import BareLayer, Keys, Layer
from msd.drafters.toolkit.network import DraftNetwork
from msd.drafters.toolkit.training import parents
from msd.targets.teacher import Lesson


class SelfFed(DraftNetwork):
    """One pass of the layers per level of a draft."""

    def drafted_feature(self, state: Tensor) -> Tensor:
        """What stands for the target's feature below a draft's state [..., H]; by default the state itself."""
        return state

    def levels(self, context: Sequence[Keys], anchors: Anchors, newest: Tensor) -> Levels:
        """See `DraftNetwork`."""
        return SelfFedLevels(self, context, anchors, newest)

    def states(self, lesson: Lesson, first: Tensor, depth: int) -> Tensor:
        """See `DraftNetwork`: every root sees the true context above it and its own draft, as in decoding."""
        assert lesson.taps is not None
        found = self.read(lesson.layout, lesson.taps[:, :-1], lesson.prompt, lesson.beside)
        anchors = found.anchors(first + lesson.prompt - 1)
        return self.drafted_states(self.whole(found, found.x)[0], anchors, lesson, first, depth)

    def drafted_states(
        self, context: Sequence[Keys], anchors: Anchors, lesson: Lesson, first: Tensor, depth: int
    ) -> Tensor:
        """`states` of anchors that are read already."""
        state, _ = self.step(anchors.x[:, :, None], anchors.positions[..., None], context, anchors.visible)
        out, own = [state], None
        for d in range(1, depth):
            word = self.embed(parents(lesson, first[..., None] + d + 1))
            x = self.entry(self.drafted_feature(state), word, anchors.image[:, :, None], d)
            mask = torch.ones(*x.shape[:3], d, dtype=torch.bool, device=x.device)
            state, own = self.step(x, anchors.positions[..., None] + d, context, anchors.visible, own, mask)
            out.append(state)
        return torch.cat(out, 2)


class SelfFedLevels:
    """The distributions of one step (see `msd.drafters.toolkit.growth.Levels`)."""

    def __init__(self, network: SelfFed, context: Sequence[Keys], anchors: Anchors, newest: Tensor) -> None:
        self.network, self.context, self.anchors, self.level = network, context, anchors, 0
        state, _ = network.step(anchors.x[:, :, None], anchors.positions[..., None], context, anchors.visible)
        self.states, self.newest = state[:, 0], newest[:, None]  # [B, F, H], of the frontier expanded last; [B, 1]
        self.own: list[Keys] | None = None
        self.lineage = state.new_zeros(len(state), 1, 0, dtype=torch.bool)  # [B, F, m]

    def root(self, weights: Tensor) -> Distributions:
        """Of the first drafted token; weights: [B, 1, 1]."""
        return self.found(self.newest)

    def below(self, tokens: Tensor, above: Tensor) -> Distributions:
        """See `Levels`."""
        self.descend(tokens, above)
        return self.found(tokens)

    def descend(self, tokens: Tensor, above: Tensor) -> tuple[Tensor, Tensor]:
        """Computes the states of the frontier `tokens`; the features and embeddings [B, F, H] that entered there."""
        self.level += 1
        network, F = self.network, tokens.shape[1]
        feature, word = network.drafted_feature(pick(self.states, above)), network.embed(tokens)
        x = network.entry(feature, word, self.anchors.image, self.level)
        eye = torch.eye(F, dtype=torch.bool, device=x.device).expand(len(x), -1, -1)
        self.lineage = torch.cat([pick(self.lineage, above), eye], -1)
        positions = (self.anchors.positions + self.level)[..., None].expand(-1, -1, F)
        state, self.own = network.step(
            x[:, None], positions, self.context, self.anchors.visible, self.own, self.lineage[:, None]
        )
        self.states = state[:, 0]
        return feature, word

    def found(self, tokens: Tensor) -> Distributions:
        """Those below the frontier `tokens`, whose states are computed."""
        one = torch.ones_like(self.states[..., 0])
        return Distributions(
            self.network.logits(self.states, tokens), self.network.sure(self.states, tokens), one[..., None]
        )


class EagleNetwork(SelfFed):
    """EAGLE's input and layer: x_i = fc([emb(y_{i+1}); h_i]) with bias, no norm before the attention (2401.15077)."""

    layer: ClassVar[type[Layer]] = BareLayer
    options: ClassVar[dict[str, float]] = {"noise": 0.1}

    def __init__(self, config: object) -> None:
        super().__init__(config)
        self.fc = Linear(2 * self.config.hidden, self.config.hidden, bias=True)

    def entry(self, feature: Tensor, word: Tensor, image: Tensor, level: int) -> Tensor:
        """fc([emb; h])."""
        out: Tensor = self.fc(torch.cat([word, feature], -1))
        return out.to(self.dtype)  # what layers add up keeps the weights' precision under autocast
