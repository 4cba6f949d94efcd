"""Draft laws level by level, for either form of the network, behind one interface.

A *frontier* holds the F nodes per row that are expanded at one level; their children's laws are asked for together. The
modality weights of a law are the caller's at the root (one subtree per modality) and the router's below it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from msd.drafters.msd.context import pick
from msd.drafters.msd.layer import Keys
from msd.drafters.msd.network import Anchors, MSDNetwork


@dataclass
class Laws:
    """logits: [B, F, Vd] over the draft vocabulary. sure: [B, F] confidence logits. weights: [B, F, M]."""

    logits: Tensor
    sure: Tensor
    weights: Tensor


class Levels(Protocol):
    """The draft laws of one step, from the root downwards."""

    def root(self, weights: Tensor) -> Laws:
        """Laws of the first drafted token under F modality weights [B, F, M]."""
        ...

    def below(self, tokens: Tensor, above: Tensor) -> Laws:
        """Laws below the frontier `tokens` [B, F], drafted from the entries `above` [B, F] of the frontier before."""
        ...


class BlockLevels:
    """All depths from one pass; a level adds the term of the parent token."""

    def __init__(self, network: MSDNetwork, context: Sequence[Keys], anchors: Anchors) -> None:
        self.network, self.anchors, self.depth = network, anchors, 0
        heads = network.heads
        self.states = network.block(context, anchors)[:, 0]  # [B, D, H]
        self.parts = heads.parts(self.states, anchors.image)  # [B, D, P, H]
        self.words = heads.head(self.parts)  # [B, D, P, Vd]
        self.terms = heads.from_state(self.parts)  # [B, D, P, R]

    def root(self, weights: Tensor) -> Laws:
        """See `Levels`."""
        return self._laws(self.anchors.embedding.expand(-1, weights.shape[1], -1), weights)

    def below(self, tokens: Tensor, above: Tensor) -> Laws:
        """See `Levels`."""
        self.depth += 1
        embedding = self.network.embed(tokens)
        state = self.network.feature_state(self.states[:, self.depth - 1, None]).expand_as(embedding)
        return self._laws(embedding, self.network.route(state, embedding).exp())

    def _laws(self, parent: Tensor, weights: Tensor) -> Laws:
        heads, d = self.network.heads, self.depth
        mix = heads.coefficients(weights)  # [B, F, P]
        logits = mix @ self.words[:, d] + heads.given_parent(mix @ self.terms[:, d], parent, weights)
        return Laws(logits, heads.sure(mix @ self.parts[:, d], parent), weights)


class ArLevels:
    """One pass of the trunk per level; the drafter's own states stand for what the target has not computed."""

    def __init__(self, network: MSDNetwork, context: Sequence[Keys], anchors: Anchors) -> None:
        self.network, self.context, self.anchors, self.depth = network, context, anchors, 0
        x = anchors.x[:, :, None]
        state, _ = network.step(x, anchors.positions[..., None], context, anchors.visible, None, None)
        self.states = state[:, 0]  # [B, F, H], of the frontier expanded last
        self.own: list[Keys] | None = None
        self.lineage = anchors.x.new_zeros(len(x), 1, 0, dtype=torch.bool)  # [B, F, m]

    def root(self, weights: Tensor) -> Laws:
        """See `Levels`."""
        F = weights.shape[1]
        self.states = self.states.expand(-1, F, -1)
        self.lineage = self.lineage.expand(-1, F, -1)
        return self._laws(self.states, self.anchors.embedding.expand(-1, F, -1), weights)

    def below(self, tokens: Tensor, above: Tensor) -> Laws:
        """See `Levels`."""
        self.depth += 1
        embedding, F = self.network.embed(tokens), tokens.shape[1]
        feature = self.network.feature_state(pick(self.states, above))
        x = self.network.entry(feature, embedding, self.anchors.image)
        eye = torch.eye(F, dtype=torch.bool, device=x.device).expand(len(x), -1, -1)
        self.lineage = torch.cat([pick(self.lineage, above), eye], -1)
        positions = (self.anchors.positions + self.depth)[..., None].expand(-1, -1, F)
        state, self.own = self.network.step(
            x[:, None], positions, self.context, self.anchors.visible, self.own, self.lineage[:, None]
        )
        self.states = state[:, 0]
        return self._laws(self.states, embedding, self.network.route(feature, embedding).exp())

    def _laws(self, states: Tensor, parent: Tensor, weights: Tensor) -> Laws:
        heads = self.network.heads
        parts = heads.parts(states, self.anchors.image)
        z = (heads.coefficients(weights)[..., None] * parts).sum(-2)
        return Laws(heads.head(z), heads.sure(z, parent), weights)


def levels(network: MSDNetwork, context: Sequence[Keys], anchors: Anchors) -> Levels:
    """The levels of the network's form; `anchors` has one anchor per row."""
    return (BlockLevels if network.config.form == "block" else ArLevels)(network, context, anchors)
