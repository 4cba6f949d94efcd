"""The two ways to draft: level by level (`SelfFed`, `EagleNetwork`) and all levels in one pass (`Block`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import lru_cache
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from msd.backends.norms import RMSNorm
from msd.backends.packed import Linear
from msd.drafters.toolkit.context import Anchors, pick
from msd.drafters.toolkit.growth import Distributions, Levels
from msd.drafters.toolkit.layers import BareLayer, Cosines, InjectedLayer, Layer
from msd.drafters.toolkit.network import DraftNetwork
from msd.drafters.toolkit.own_head import add_head, draft_ids
from msd.drafters.toolkit.training import parents
from msd.drafters.toolkit.variant import Variant
from msd.targets.teacher import TeacherBatch

AT_ONCE = 8  # levels whose rotary embeddings are computed together


class SelfFed(DraftNetwork):
    """Runs the layers once per draft level, on its own states in place of the unknown target states.

    EAGLE (Li et al. 2024, arXiv 2401.15077, section 4.1).
    """

    def drafted_feature(self, state: Tensor) -> Tensor:
        """Predicts the target's feature from a draft state [..., H]; by default it is the state itself."""
        return state

    def levels(self, anchors: Anchors, newest: Tensor) -> Levels:
        """See `DraftNetwork`."""
        return SelfFedLevels(self, anchors, newest)

    def anchor_states(self, anchors: Anchors) -> Tensor:
        """Computes the states [B, A, 1, H] at the anchors."""
        return self.run_anchors(anchors.x[:, :, None], anchors.positions[..., None], anchors, stored=True)

    def draft_states(self, anchors: Anchors, batch: TeacherBatch, roots: Tensor, depth: int) -> Tensor:
        """See `DraftNetwork`."""
        state = self.anchor_states(anchors)
        assert anchors.visible is not None
        out, draft = [state], None
        for d in range(1, depth):
            embedding = self.embed(parents(batch, roots[..., None] + d + 1))
            x = self.entry(self.drafted_feature(state), embedding, anchors.image[:, :, None], d)
            mask = torch.ones(*x.shape[:3], d, dtype=torch.bool, device=x.device)
            positions = anchors.positions[..., None] + d
            state, draft = self.run_layers(x, positions, anchors.context, anchors.visible, draft, mask)
            out.append(state)
        return torch.cat(out, 2)


def inherited(weights: Tensor, above: Tensor) -> Tensor:
    """Returns the modality weights [B, F, M] of the parents of a frontier; above: [B, F], see `Levels.below`."""
    return pick(weights, above) if weights.shape[1] > 1 else weights.expand(-1, above.shape[1], -1)


class StateLevels(ABC):
    """Distributions that ignore modality, from states [B, F, H] of the frontier (see `Levels`).

    All subtrees share the distribution of the root; each keeps its modality weights down to the leaves.
    """

    def __init__(self, network: DraftNetwork, states: Tensor, newest: Tensor) -> None:
        self.network, self.states, self.newest, self.level = network, states, newest, 0
        self.weights = torch.empty(0)  # [B, F, M]

    def root(self, weights: Tensor) -> Distributions:
        """See `Levels`."""
        self.weights, F = weights, weights.shape[1]
        shared = self._distributions(self.newest[:, None])
        self.states = self.states.expand(-1, F, -1)
        return Distributions(shared.logits.expand(-1, F, -1), shared.confidence.expand(-1, F), weights)

    def below(self, tokens: Tensor, above: Tensor) -> Distributions:
        """See `Levels`."""
        self.weights = inherited(self.weights, above)
        self.descend(tokens, above)
        return self._distributions(tokens)

    def _distributions(self, tokens: Tensor) -> Distributions:
        network, states = self.network, self.states
        return Distributions(network.logits(states, tokens), network.confidence_logits(states, tokens), self.weights)

    @abstractmethod
    def descend(self, tokens: Tensor, above: Tensor) -> Any:
        """Sets `level` and `states` to those of the frontier `tokens` [B, F]; above: see `Levels.below`."""


class SelfFedLevels(StateLevels):
    """The distributions of one step of a `SelfFed` network."""

    network: SelfFed

    def __init__(self, network: SelfFed, anchors: Anchors, newest: Tensor) -> None:
        super().__init__(network, network.anchor_states(anchors)[:, 0], newest)
        self.anchors, self.context = anchors, anchors.context
        self.rotary: list[Cosines] = []  # of each level; the root has level 0
        self.seen: Tensor | None = None  # [B, F, all] bool: the entries that a frontier node sees (see `Layer.draft`)

    def descend(self, tokens: Tensor, above: Tensor) -> tuple[Tensor, Tensor]:
        """See `StateLevels`; returns the frontier's input features and embeddings, [B, F, H] each."""
        self.level += 1
        network, (B, F), anchors = self.network, tokens.shape, self.anchors
        feature, embedding = network.drafted_feature(pick(self.states, above)), network.embed(tokens)
        x = network.entry(feature, embedding, anchors.image, self.level)
        own = identity(F, x.device).expand(B, -1, -1)
        if self.seen is not None:
            self.seen = torch.cat([pick(self.seen, above), own], -1)
        elif anchors.visible is None:
            self.seen = nn.functional.pad(own, (anchors.context[0].keys.shape[1], 0), value=True)
        else:
            self.seen = torch.cat([anchors.visible.expand(-1, F, -1), own], -1)
        self.states, self.context = network.run_draft(x, self._rotary(), self.context, self.seen)
        return feature, embedding

    def _rotary(self) -> Cosines:
        """The rotary embedding of the frontier; that of some levels is computed at once."""
        if self.level >= len(self.rotary):
            levels = torch.arange(len(self.rotary), len(self.rotary) + AT_ONCE, device=self.anchors.positions.device)
            cos, sin = (x.split(1, 1) for x in self.network.rotary(self.anchors.positions + levels))
            self.rotary += zip(cos, sin, strict=True)
        return self.rotary[self.level]


@lru_cache(maxsize=64)
def identity(size: int, device: torch.device) -> Tensor:
    """Returns the identity matrix [size, size] bool."""
    return torch.eye(size, dtype=torch.bool, device=device)


class EagleNetwork(SelfFed):
    """EAGLE's input and layer: x_i = fc([emb(y_{i+1}); h_i]) with bias, no norm before the attention (2401.15077)."""

    layer: ClassVar[type[Layer]] = BareLayer
    depth = 6  # the released code's depth of 5 counts the levels below the first
    options: ClassVar[dict[str, float]] = {"noise": 0.1}

    def __init__(self, config: object) -> None:
        super().__init__(config)
        self.fc = Linear(2 * self.config.hidden, self.config.hidden, bias=self.config.variant.fc_bias)

    def entry(self, feature: Tensor, embedding: Tensor, image: Tensor, level: int) -> Tensor:
        """fc([emb; h])."""
        out: Tensor = self.fc(torch.cat([embedding, feature], -1))
        return out.to(self.dtype)  # under autocast residual sums keep the precision of the weights


class Block(DraftNetwork):
    """Runs the layers once per draft, on the root's embedding followed by mask embeddings.

    New networks have the published layout: RMSNorm of query and key heads, and the target's embedding of one id, its
    padding token or else its last one, as the mask. Two layers instead of the published five: the targets that can be
    trained for on a CPU have a hidden size of some hundreds, where a layer costs more than it accepts.

    offset: distance from a block position to the token that it drafts: 0 where a mask is replaced by its own token, 1
    where every position drafts the next one.
    """

    layer = InjectedLayer
    layer_count = 2
    offset: int = 0
    d2t: Tensor
    lm_head: Linear

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        H = config.hidden
        self.fc = Linear(len(config.taps[:-1]) * H, H, bias=False)
        self.context_norm, self.norm = RMSNorm(H, config.eps), RMSNorm(H, config.eps)
        v = config.variant
        self.mask = nn.Parameter(torch.randn(H) * 0.02) if v.mask_token is None else None
        self.offset = type(self).offset if v.from_root is None else int(v.from_root)
        if v.head:
            add_head(self)

    @classmethod
    def for_target(cls, text_config: Any, **changes: Any) -> Self:
        """See `DraftNetwork`."""
        padding = getattr(text_config, "pad_token_id", None)
        known = padding is not None and 0 <= padding < text_config.vocab_size
        mask = padding if known else text_config.vocab_size - 1
        own = Variant(head_norm=True, mask_token=mask, from_root=bool(cls.offset))
        return super().for_target(text_config, **{"variant": own} | changes)

    @property
    def ids(self) -> Tensor:
        """See `DraftNetwork`."""
        return draft_ids(self.d2t) if self.config.variant.head else super().ids

    def head(self, state: Tensor) -> Tensor:
        """See `DraftNetwork`; the output layer of its own, where it has one."""
        return self.lm_head(state) if self.config.variant.head else super().head(state)

    @classmethod
    def tapped(cls, layers: int) -> tuple[int, ...]:
        """Returns three evenly spaced layers from 2 to L-2 (DFlash, released code), and L, for training."""
        first, last = min(2, layers - 1), max(layers - 2, min(2, layers - 1))
        return (*sorted({first, round((first + last) / 2), last}), layers)

    def feature(self, taps: Tensor) -> Tensor:
        """norm(fc([states])), the same for all layers."""
        fused = self.fc(taps[..., : -self.config.hidden].to(self.dtype))
        return self.context_norm(fused.to(self.dtype))  # as without autocast

    def entry(self, feature: Tensor, embedding: Tensor, image: Tensor, level: int) -> Tensor:
        """The feature alone."""
        return feature

    def block(self, anchors: Anchors, depth: int) -> Tensor:
        """Computes normalised states [B, A, D, H] that draft the D = depth tokens below each root."""
        n = depth + 1 - self.offset
        token, given = self.config.variant.mask_token, self.mask
        mask = self.embed(torch.tensor(token, device=anchors.embedding.device)) if given is None else given
        masks = mask.expand(*anchors.embedding.shape[:2], n - 1, -1)
        x = torch.cat([anchors.embedding[:, :, None], masks], 2)
        positions = anchors.positions[..., None] + torch.arange(1, n + 1, device=x.device)
        return self.norm(self.run_anchors(x, positions, anchors)[:, :, n - depth :])

    def levels(self, anchors: Anchors, newest: Tensor) -> BlockLevels:
        """See `DraftNetwork`."""
        return BlockLevels(self, self.block(anchors, self.config.depth)[:, 0], newest)

    def draft_states(self, anchors: Anchors, batch: TeacherBatch, roots: Tensor, depth: int) -> Tensor:
        """See `DraftNetwork`; the block is as long as in decoding, whatever `depth`."""
        return self.block(anchors, self.config.depth)[:, :, :depth]


class BlockLevels(StateLevels):
    """The distributions of one step of a `Block` network, from the states [B, D, H] of all levels."""

    def __init__(self, network: Block, states: Tensor, newest: Tensor) -> None:
        super().__init__(network, states[:, :1], newest)
        self.all_states = states

    def descend(self, tokens: Tensor, above: Tensor) -> None:
        """See `StateLevels`."""
        self.level += 1
        self.states = self.all_states[:, self.level, None].expand(-1, tokens.shape[1], -1)
