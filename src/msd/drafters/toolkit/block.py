"""Drafting all levels in one pass: a block of the root's embedding and masks, whose positions see each other.

Context enters every layer as keys and values made of fused target states (context injection, DFlash, arXiv 2602.06036,
section 3). Context positions are those before the root, whose own state the target has not computed yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from msd.backends.packed import Linear
from msd.drafters.toolkit.context import Anchors
from msd.drafters.toolkit.growth import Distributions
from msd.drafters.toolkit.layers import InjectedLayer, Keys
from msd.drafters.toolkit.network import DraftNetwork
from msd.targets.teacher import Lesson


class Block(DraftNetwork):
    """One pass of the layers per draft.

    offset: how far the token that a block position drafts is from its place: 0 where a mask stands for the token
    itself, 1 where every position drafts the next one.

    The mask's embedding is learnt, as the target has no token for it.
    """

    layer = InjectedLayer
    layer_count = 2
    roots = 16
    offset = 0

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        H = config.hidden
        self.fc = Linear(len(config.taps[:-1]) * H, H, bias=False)
        self.context_norm, self.norm = nn.RMSNorm(H, config.eps), nn.RMSNorm(H, config.eps)
        self.mask = nn.Parameter(torch.randn(H) * 0.02)

    @classmethod
    def tapped(cls, layers: int) -> tuple[int, ...]:
        """Three states from after the second layer to three before the last, evenly spaced (DFlash, released code).

        Then the final one, which training reads.
        """
        first, last = min(2, layers - 1), max(layers - 2, min(2, layers - 1))
        return (*sorted({first, round((first + last) / 2), last}), layers)

    def feature(self, taps: Tensor) -> Tensor:
        """norm(fc([states])), the same for all layers."""
        fused = self.fc(taps[..., : -self.config.hidden].to(self.dtype))
        out: Tensor = self.context_norm(fused.to(self.dtype))  # as without autocast
        return out

    def entry(self, feature: Tensor, word: Tensor, image: Tensor, level: int) -> Tensor:
        """The feature alone."""
        return feature

    def block(self, context: Sequence[Keys], anchors: Anchors, depth: int) -> Tensor:
        """Normalised states [B, A, D, H] that draft the D = depth tokens below each anchor's root."""
        n = depth + 1 - self.offset
        masks = self.mask.expand(*anchors.embedding.shape[:2], n - 1, -1)
        x = torch.cat([anchors.embedding[:, :, None], masks], 2)
        positions = anchors.positions[..., None] + torch.arange(1, n + 1, device=x.device)
        state, _ = self.step(x, positions, context, anchors.visible, None, x.new_ones(*x.shape[:3], n).bool())
        out: Tensor = self.norm(state[:, :, n - depth :])
        return out

    def levels(self, context: Sequence[Keys], anchors: Anchors, newest: Tensor) -> BlockLevels:
        """See `DraftNetwork`."""
        return BlockLevels(self, self.block(context, anchors, self.config.depth)[:, 0], newest)

    def states(self, lesson: Lesson, first: Tensor, depth: int) -> Tensor:
        """See `DraftNetwork`. The block is as long as in decoding, whatever is asked for."""
        assert lesson.taps is not None
        found = self.read(lesson.layout, lesson.taps[:, :-1], lesson.prompt)
        anchors = found.anchors(first + lesson.prompt - 1)
        return self.block(self.whole(found, found.x)[0], anchors, self.config.depth)[:, :, :depth]


class BlockLevels:
    """The distributions of one step, from states [B, D, H] (see `msd.drafters.toolkit.growth.Levels`)."""

    def __init__(self, network: Block, states: Tensor, newest: Tensor) -> None:
        self.network, self.all, self.newest, self.level = network, states, newest, 0

    def root(self, weights: Tensor) -> Distributions:
        """Of the first drafted token; weights: [B, 1, 1]."""
        return self._found(self.newest[:, None])

    def below(self, tokens: Tensor, above: Tensor) -> Distributions:
        """Below the frontier `tokens` [B, F]."""
        self.level += 1
        return self._found(tokens)

    def _found(self, parents: Tensor) -> Distributions:
        states = self.all[:, self.level, None].expand(-1, parents.shape[1], -1)
        one = torch.ones_like(states[..., 0])
        return Distributions(self.network.logits(states, parents), self.network.sure(states, parents), one[..., None])
