"""Drafting level by level: a draft's own state stands for the target state that is not known yet.

EAGLE (Li et al. 2024, arXiv 2401.15077, section 4.1).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from msd.drafters.msd.context import pick
from msd.drafters.msd.laws import Laws
from msd.drafters.msd.layer import Keys
from msd.drafters.msd.network import Anchors
from msd.drafters.rivals.network import Rival, whole
from msd.drafters.rivals.teaching import parents
from msd.targets.teacher import Lesson


class Autoregressive(Rival):
    """One pass of the layers per level of a draft."""

    def laws(self, context: Sequence[Keys], anchors: Anchors, newest: Tensor) -> LevelByLevel:
        """See `Rival`."""
        return LevelByLevel(self, context, anchors, newest)

    def states(self, lesson: Lesson, first: Tensor, depth: int) -> Tensor:
        """See `Rival`: every root sees the true context above it and its own draft, as in decoding."""
        assert lesson.taps is not None
        found = self.entries(lesson.layout, lesson.taps[:, :-1], lesson.prompt)
        feature = self.noisy(self.feature(found.taps))
        x = self.enter(found, feature)
        anchors = found.anchors(x, feature, first + lesson.prompt - 1)
        context, _ = whole(self, found, x)
        state, _ = self.step(anchors.x[:, :, None], anchors.positions[..., None], context, anchors.visible)
        out, own = [state], None
        for d in range(1, depth):
            x = self.entry(state, self.embed(parents(lesson, first[..., None] + d + 1)), anchors.image[:, :, None], d)
            mask = torch.ones(*x.shape[:3], d, dtype=torch.bool, device=x.device)
            state, own = self.step(x, anchors.positions[..., None] + d, context, anchors.visible, own, mask)
            out.append(state)
        return torch.cat(out, 2)

    def noisy(self, feature: Tensor) -> Tensor:
        """Features with noise from U(-a, a) in training, a being option "noise" (EAGLE, section 4.1: a = 0.1)."""
        a = self.config.options.get("noise", 0.0)
        return feature + (2 * torch.rand_like(feature) - 1) * a if self.training and a else feature


class LevelByLevel:
    """The laws of one step (see `msd.drafters.msd.laws.Levels`)."""

    def __init__(self, network: Autoregressive, context: Sequence[Keys], anchors: Anchors, newest: Tensor) -> None:
        self.network, self.context, self.anchors, self.level = network, context, anchors, 0
        state, _ = network.step(anchors.x[:, :, None], anchors.positions[..., None], context, anchors.visible)
        self.states, self.tokens = state[:, 0], newest[:, None]  # [B, F, H] and [B, F], of the frontier expanded last
        self.own: list[Keys] | None = None
        self.lineage = state.new_zeros(len(state), 1, 0, dtype=torch.bool)  # [B, F, m]

    def root(self, weights: Tensor) -> Laws:
        """The law of the first drafted token; weights: [B, 1, 1]."""
        return self._laws()

    def below(self, tokens: Tensor, above: Tensor) -> Laws:
        """Laws below the frontier `tokens` [B, F], drafted from the entries `above` [B, F] of the one before."""
        self.level += 1
        B, F = tokens.shape
        x = self.network.entry(pick(self.states, above), self.network.embed(tokens), self.anchors.image, self.level)
        eye = torch.eye(F, dtype=torch.bool, device=x.device).expand(B, -1, -1)
        self.lineage = torch.cat([pick(self.lineage, above), eye], -1)
        positions = (self.anchors.positions + self.level)[..., None].expand(-1, -1, F)
        state, self.own = self.network.step(
            x[:, None], positions, self.context, self.anchors.visible, self.own, self.lineage[:, None]
        )
        self.states, self.tokens = state[:, 0], tokens
        return self._laws()

    def _laws(self) -> Laws:
        one = torch.ones_like(self.states[..., 0])
        return Laws(self.network.logits(self.states, self.tokens), 0 * one, one[..., None])
