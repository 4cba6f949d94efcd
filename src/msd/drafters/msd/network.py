"""The drafter's network: fused target taps -> context -> states below an anchor -> draft laws.

Position i of the text enters as x_i = fc([feature_i; emb(y_{i+1})]), feature_i being the target's fused tap states; an
image enters as a few compressed tokens. Two forms share all of it:

    ar      state s_1 at x_i drafts y_{i+2}; below, feature_state(s) stands for the feature the target has not computed
            yet (self-fed, EAGLE). One pass per level.
    block   D queries x_i + depth_d in one pass, seeing each other; words below depth 1 are then conditioned on their
            parent by a low-rank term (DFlash, DSpark). One pass for all levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from msd.backends.packed import Linear
from msd.drafters.msd.beside import BesideAdaptor
from msd.drafters.msd.config import MSDConfig
from msd.drafters.msd.heads import Heads
from msd.drafters.msd.layer import Keys, Layer, Rotary, TapNorm, step
from msd.drafters.msd.router import Probe
from msd.drafters.msd.vision import VisionAdaptor
from msd.tree import DraftTree

SURELY = 1.4  # logit of an ending from which a draft is not worth its time: a chance of 0.8


@dataclass
class Anchors:
    """A positions per row to draft from. B rows, S context entries.

    x, feature, embedding: [B, A, H], the last of the token that follows the anchor (the root).
    positions: [B, A] rotary position of the anchor. visible: [B, A, S] bool. image: [B, 1, H] global vector.
    """

    x: Tensor
    feature: Tensor
    embedding: Tensor
    positions: Tensor
    visible: Tensor
    image: Tensor

    def of(self, rows: list[int] | slice, used: int) -> Anchors:
        """Those of some rows, which see the first `used` entries at most."""
        x, feature, embedding = self.x[rows], self.feature[rows], self.embedding[rows]
        return Anchors(x, feature, embedding, self.positions[rows], self.visible[rows][..., :used], self.image[rows])


class MSDNetwork(nn.Module):
    """All weights of an MSD drafter. `embed` is the target's own embedding, which is not among them."""

    def __init__(self, config: MSDConfig) -> None:
        super().__init__()
        self.config = c = config
        H, wide = c.hidden, c.hidden * len(c.taps)
        self.tap_norm, self.fuse = TapNorm(len(c.taps), H, c.eps), Linear(wide, H, bias=False)
        self.feature_norm, self.word_norm = nn.RMSNorm(H, c.eps), nn.RMSNorm(H, c.eps)
        self.fc = Linear(2 * H, H, bias=False)
        self.feature_state = Linear(H, H, bias=False)
        self.rotary = Rotary(c.head_dim, c.rope_theta)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.layers))
        self.heads = Heads(c)
        self.router = Probe(H, len(c.modalities), c.eps) if c.router else None
        self.ending = Probe(H, 1, c.eps)
        if c.vision:
            self.adaptor = VisionAdaptor(c)
        self.beside = BesideAdaptor(c) if c.beside else None
        self.image_fc = Linear(H, H, bias=False) if c.vision or c.beside else None
        if self.image_fc is not None:
            nn.init.zeros_(self.image_fc.weight)
        if c.form == "block":
            self.depths = nn.Parameter(torch.randn(c.depth, H) * 0.02)
        self._packed: torch.dtype | None = None
        self._embedding: list[nn.Module] = []  # in a list, so that it is no part of the state dict

    def attach(self, embedding: nn.Module) -> MSDNetwork:
        """Gives the network the target's word embedding."""
        self._embedding = [embedding]
        return self

    @property
    def ids(self) -> Tensor:
        """[Vd] int64: the target's id of each draft token."""
        return self.heads.ids

    def embed(self, tokens: Tensor) -> Tensor:
        """Target embeddings [..., H] of token ids [...], normalised: their own scale is a tenth of the states'."""
        out: Tensor = self.word_norm(self._embedding[0](tokens).to(self.fc.weight.dtype))
        return out

    def feature(self, taps: Tensor) -> Tensor:
        """Tap states [..., T*H] -> fused feature [..., H]."""
        out: Tensor = self.fuse(self.tap_norm(taps.to(self.fc.weight.dtype)))
        return out

    def entry(self, feature: Tensor, embedding: Tensor, image: Tensor) -> Tensor:
        """x [..., H] of a text position; `image` [..., H] is zero without image before it or tokens beside it."""
        seen = feature if self.image_fc is None else feature + self.image_fc(image)
        out: Tensor = self.fc(torch.cat([self.feature_norm(seen), embedding], -1))
        return out.to(self.fc.weight.dtype)  # what layers add up keeps the weights' precision under autocast

    def route(self, feature: Tensor, embedding: Tensor) -> Tensor:
        """Log-probabilities [..., M] of the class of the token after next."""
        if self.router is None:
            M = len(self.config.modalities)
            return feature.new_full((*feature.shape[:-1], M), 1.0 / M).log()
        logits: Tensor = self.router(feature, embedding)
        return logits.log_softmax(-1)

    def ends(self, feature: Tensor, embedding: Tensor) -> Tensor:
        """Logit [...] of the token after next being the answer's last."""
        out: Tensor = self.ending(feature, embedding).squeeze(-1)
        return out

    def all_end(self, taps: Tensor, tokens: Tensor) -> bool:
        """Whether every answer most likely ends with the token that the target's pass gives anyway.

        taps: [R, T*H], the target's states before the newest tokens [R].
        """
        return bool((self.ends(self.feature(taps), self.embed(tokens)) > SURELY).all())

    def classes(self, tree: DraftTree, taps: Tensor, root: Tensor) -> Tensor:
        """[B, N] registry ids: the class of the token below each node, from the target's states before the node.

        taps: [B, N, T*H], its states at the nodes. root: [B, 1, H], the fused feature before the root.
        """
        above = self.feature(taps)
        above = above[torch.arange(len(above), device=above.device)[:, None], tree.parents.clamp_min(0)]
        above = torch.where((tree.parents < 0)[..., None], root, above)
        kinds = self.route(above, self.embed(tree.tokens)).argmax(-1)
        return torch.tensor(self.config.modality_ids, device=kinds.device)[kinds]

    def pack(self, dtype: torch.dtype = torch.float32) -> None:
        """Packs the linear layers for decoding on this machine; the weights must not change after that.

        dtype: of their products. Drafts need not be exact: in bfloat16 they cost half and are nearly as good.
        """
        if self._packed == dtype:
            return
        self._packed = dtype
        for module in self.modules():
            if isinstance(module, Linear | Layer):
                module.pack(dtype)

    def context(self, x: Tensor, positions: Tensor) -> list[Keys]:
        """Keys and values of context entries x [B, S, H] at positions [B, S], for every layer."""
        turn = self.rotary(positions)
        return [layer.keys(x, turn) for layer in self.layers]  # type: ignore[operator]

    def block(self, context: Sequence[Keys], anchors: Anchors) -> Tensor:
        """States of all depths in one pass: [B, A, D, H]; state d-1 drafts the d-th token below the root."""
        D = len(self.depths)
        h = anchors.x[:, :, None] + self.depths
        turn = self.rotary(anchors.positions[..., None] + torch.arange(D, device=h.device))
        mask = torch.ones(*h.shape[:3], D, dtype=torch.bool, device=h.device)
        for layer, keys in zip(self.layers, context, strict=True):
            h, _ = layer(h, turn, keys, anchors.visible, None, mask)
        return h

    def step(
        self,
        x: Tensor,
        positions: Tensor,
        context: Sequence[Keys],
        visible: Tensor,
        own: list[Keys] | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, list[Keys] | None]:
        """One autoregressive level: n queries x [B, A, n, H] -> (states [B, A, n, H], drafts' keys with theirs added).

        mask: [B, A, n, m+n] bool; None: the queries are the anchors themselves, which the context holds already.
        """
        return step(self.layers, x, self.rotary(positions), context, visible, own, mask)  # type: ignore[arg-type]
