"""Drafting level by level: a draft's own state stands for the target state that is not known yet.

EAGLE (Li et al. 2024, arXiv 2401.15077, section 4.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from msd.backends.packed import Linear
from msd.drafters.toolkit.context import Anchors, pick
from msd.drafters.toolkit.growth import Distributions, Levels
from msd.drafters.toolkit.layers import BareLayer, InjectedLayer, Keys, Layer
from msd.drafters.toolkit.network import DraftNetwork
from msd.drafters.toolkit.training import parents
from msd.targets.teacher import TeacherBatch


class SelfFed(DraftNetwork):
    """One pass of the layers per level of a draft."""

    def drafted_feature(self, state: Tensor) -> Tensor:
        """What stands for the target's feature below a draft's state [..., H]; by default the state itself."""
        return state

    def levels(self, context: Sequence[Keys], anchors: Anchors, newest: Tensor) -> Levels:
        """See `DraftNetwork`."""
        return SelfFedLevels(self, context, anchors, newest)

    def states(self, batch: TeacherBatch, first: Tensor, depth: int) -> Tensor:
        """See `DraftNetwork`: every root sees the true context above it and its own draft, as in decoding."""
        assert batch.taps is not None
        found = self.read(batch.layout, batch.taps[:, :-1], batch.prompt, batch.auxiliary)
        anchors = found.anchors(first + batch.prompt - 1)
        return self.drafted_states(self.whole(found, found.x)[0], anchors, batch, first, depth)

    def drafted_states(
        self, context: Sequence[Keys], anchors: Anchors, batch: TeacherBatch, first: Tensor, depth: int
    ) -> Tensor:
        """`states` of anchors that are read already."""
        state, _ = self.step(anchors.x[:, :, None], anchors.positions[..., None], context, anchors.visible)
        out, own = [state], None
        for d in range(1, depth):
            word = self.embed(parents(batch, first[..., None] + d + 1))
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

    def states(self, batch: TeacherBatch, first: Tensor, depth: int) -> Tensor:
        """See `DraftNetwork`. The block is as long as in decoding, whatever is asked for."""
        assert batch.taps is not None
        found = self.read(batch.layout, batch.taps[:, :-1], batch.prompt)
        anchors = found.anchors(first + batch.prompt - 1)
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
