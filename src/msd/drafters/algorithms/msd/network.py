"""MSD's network: fused target taps -> context -> states below an anchor -> draft distributions.

Text position i has the input x_i = [emb(y_{i+1}); feature_i], or with `pair` off a linear map of it; feature_i fuses
the target's tap states. So has each token of an image; with the part `vision`, the image becomes a few compressed
tokens. The network has two forms:

    ar      the state at x_i drafts y_{i+2}; below it, feature_state(state) predicts the feature that the target has not
            computed yet (self-fed, EAGLE). One pass per level.
    block   D queries x_i + depth_d in one pass, which see each other; below depth 1 a low-rank term conditions the
            logits on the parent token (DFlash, DSpark). One pass for all levels.

The output layer has a reduced vocabulary and, with `experts`, a low-rank expert per modality. With `transfer`, the
experts of the other modalities correct the language expert's output instead of the bare state.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from msd.backends.norms import RMSNorm
from msd.backends.packed import Linear
from msd.core.layout import Layout
from msd.core.tree import DraftTree
from msd.drafters.algorithms.msd.block import BlockLevels, Words
from msd.drafters.algorithms.msd.config import FORMS, SWITCHES, MSDConfig, shapes_of
from msd.drafters.toolkit.chance import NodeFeatures, log_chance
from msd.drafters.toolkit.context import (
    Anchors,
    Columns,
    Entries,
    Images,
    Selection,
    left_aligned,
    pick,
    real_columns,
    select_columns,
    visual_columns,
)
from msd.drafters.toolkit.growth import Distributions, Levels
from msd.drafters.toolkit.layers import AuxiliaryAdaptor, Layer, PairLayer, ReadOut, Seen, TapNorm, VisionAdaptor
from msd.drafters.toolkit.levels import SelfFed, SelfFedLevels, inherited
from msd.drafters.toolkit.probe import Probe
from msd.labels import EVENT_MODALITIES
from msd.targets.taps import final_norm, output_layer, text_decoder
from msd.targets.teacher import TeacherBatch

STORED = ("log_odds", "confidence", "bias")  # features of the calibration that older folders hold as a tensor


def _expert(wide: int, hidden: int, rank: int) -> nn.Sequential:
    """Creates a low-rank correction [..., wide] -> [..., hidden], initially zero."""
    down, up = nn.Linear(wide, rank, bias=False), nn.Linear(rank, hidden, bias=False)
    nn.init.zeros_(up.weight)
    return nn.Sequential(OrderedDict(down=down, up=up))


class Experts(nn.Module):
    """One expert per modality; all except the language expert also read the image's global vector."""

    _packed: tuple[Tensor, Tensor] | None = None  # all experts as two matrices [M*r, 2H] and [M*H, M*r]

    def __init__(self, config: MSDConfig) -> None:
        super().__init__()
        H = config.hidden
        self.transfer = config.transfer
        self.language = _expert(H, H, config.rank)
        self.others = nn.ModuleList(_expert(2 * H, H, config.rank) for _ in config.modalities[1:])

    def parts(self, z: Tensor, image: Tensor) -> Tensor:
        """Computes each expert's corrected state [..., M, H] from states z and image vectors [..., H].

        A mixture of experts is linear in these parts, so its logits are a mixture of the parts' logits.
        """
        both = torch.cat([z, image.expand_as(z)], -1)
        if self._packed is not None and not torch.is_grad_enabled():
            down, up = self._packed
            return z[..., None, :] + F.linear(F.linear(both, down), up).unflatten(-1, (-1, z.shape[-1]))
        language = z + self.language(z)
        base = language if self.transfer else z
        return torch.stack([language, *(base + expert(both) for expert in self.others)], -2)

    @torch.no_grad()
    def pack(self) -> None:
        """Joins the experts for decoding; with transfer the language expert's output is in each of them."""
        experts = [self.language, *self.others]
        downs, ups = ([getattr(expert, name).weight for expert in experts] for name in ("down", "up"))
        downs[0] = F.pad(downs[0], (0, downs[0].shape[1]))
        up = torch.block_diag(*ups)
        if self.transfer:
            up[:, : ups[0].shape[1]] = ups[0].repeat(len(experts), 1)
        self._packed = torch.cat(downs), up


class Heads(nn.Module):
    """Computes logits over the draft vocabulary, and confidence, from trunk states.

    In the block form all depths come from one pass, so a state does not depend on its parent token. A low-rank term per
    modality conditions the logits on it (DSpark's Markov head, extended by modality and state).
    """

    ids: Tensor  # [Vd] int64: the target's id of each draft token
    calibration: Tensor  # [3]: weights of the features `STORED`; [1, 0, 0], which is log q, in new networks

    def __init__(self, config: MSDConfig) -> None:
        super().__init__()
        c, H = config, config.hidden
        self.norm = RMSNorm(H, c.eps)
        self.experts = Experts(c) if c.experts else None
        self.head = Linear(H, c.draft_vocabulary, bias=False)
        self.register_buffer("ids", torch.zeros(c.draft_vocabulary, dtype=torch.long))
        self.register_buffer("calibration", torch.tensor([1.0, 0.0, 0.0]))
        self.confidence = nn.Linear(2 * H, 1)
        self.block = c.form == "block"
        if self.block:
            experts = len(c.modalities) if c.experts else 1
            self.from_state = Linear(H, c.parent_rank, bias=False)
            self.from_parent = Linear(H, c.parent_rank * experts, bias=False)
            self.to_words = Linear(c.parent_rank, c.draft_vocabulary, bias=False)
            nn.init.zeros_(self.to_words.weight)

    def parts(self, state: Tensor, image: Tensor) -> Tensor:
        """Trunk state [..., H], image vector [..., H] -> parts [..., P, H] (P = 1 without experts)."""
        z = self.norm(state)
        return z[..., None, :] if self.experts is None else self.experts.parts(z, image)

    def mixed(self, state: Tensor, image: Tensor, weights: Tensor) -> Tensor:
        """Mixes the parts by the modality weights [..., M] (sum 1): [..., H]."""
        parts = self.parts(state, image)
        return parts[..., 0, :] if self.experts is None else (weights[..., None, :] @ parts).squeeze(-2)

    def parent_logits(self, logits: Tensor, from_state: Tensor, parent: Tensor, weights: Tensor) -> Tensor:
        """Adds the block form's term of the parent token to logits [..., Vd].

        from_state: [..., R], `self.from_state` of the mixed parts. parent: [..., H], embedded. weights: [..., M].
        """
        by_expert = self.from_parent(parent).unflatten(-1, (-1, from_state.shape[-1]))
        mixed = by_expert[..., 0, :] if self.experts is None else (weights[..., None, :] @ by_expert).squeeze(-2)
        return self.to_words.plus(F.silu(from_state + mixed), logits)

    def confidence_logits(self, z: Tensor, parent: Tensor) -> Tensor:
        """Predicts the logit [...] of Σ min(p, q) from mixed states z and parent embeddings, both [..., H]."""
        return self.confidence(torch.cat([z, parent], -1)).squeeze(-1)


class MSDNetwork(SelfFed):
    """All weights of an MSD drafter, with its own output layer over the draft vocabulary."""

    roots, stages = 12, None
    reduced = routes = True
    forms, parts = FORMS, SWITCHES
    config: MSDConfig

    def __init__(self, config: MSDConfig) -> None:
        self.layer: type[Layer] = PairLayer if config.pair else Layer  # type: ignore[misc]
        super().__init__(config)
        c, H = config, config.hidden
        self.heads = Heads(c)
        self.router = Probe(H, len(c.modalities), c.eps) if c.router else None
        self.ending = Probe(H, 1, c.eps)
        if c.vision:
            self.adaptor = VisionAdaptor(c, len(c.taps), c.image_tokens)
        self.readout = ReadOut(c) if c.readout else None
        # the name of its tensors in checkpoints
        self.register_module("beside", AuxiliaryAdaptor(c, c.auxiliary) if c.auxiliary else None)
        self.image_fc = Linear(H, H, bias=False) if c.vision or c.auxiliary else None
        if self.image_fc is not None:
            nn.init.zeros_(self.image_fc.weight)
        if c.form == "block":
            self.depths = nn.Parameter(torch.randn(c.depth, 2 * H if c.pair else H) * 0.02)
        self.words: Words | None = None

    @property
    def auxiliary_adaptor(self) -> AuxiliaryAdaptor | None:
        """None in a network that was trained without auxiliary tokens."""
        return self._modules["beside"]  # type: ignore[return-value]

    def add_inputs(self) -> None:
        """See `DraftNetwork`."""
        c, H, wide = self.config, self.config.hidden, self.config.hidden * len(self.config.taps)
        self.tap_norm, self.fuse = TapNorm(len(c.taps), H, c.eps), Linear(wide, H, bias=False)
        self.word_norm = RMSNorm(H, c.eps)
        if not c.pair:
            self.feature_norm, self.fc = RMSNorm(H, c.eps), Linear(2 * H, H, bias=False)
        self.feature_state = Linear(H, H, bias=False)

    @classmethod
    def for_target(cls, text_config: Any, **changes: Any) -> Self:
        """See `DraftNetwork`; it drafts the whole vocabulary unless `draft_vocabulary` is given."""
        size = changes.pop("draft_vocabulary", text_config.vocab_size)
        return cls(MSDConfig.for_target(text_config, size, **changes))

    @classmethod
    def trained_as(cls, settings: Any, auxiliary: tuple[tuple[int, int], ...] | None) -> dict[str, Any]:
        """See `DraftNetwork`; with event recordings its modalities are those of events."""
        changes: dict[str, Any] = {"form": settings.form}
        if settings.parts is not None:
            changes |= dict.fromkeys(SWITCHES, False) | dict.fromkeys(settings.parts, True)
        if auxiliary is not None:
            names = tuple(m.name for m in EVENT_MODALITIES)
            groups = auxiliary if changes.get("motion") else auxiliary[:2]
            changes |= {"modalities": names, "shapes": shapes_of(names), "auxiliary": groups}
        return changes

    def _alike(self, text_config: Any) -> Self:
        copied = ("form", "pair", "modalities", "shapes", "shared", "active_from", *SWITCHES)
        changes = {name: getattr(self.config, name) for name in copied}
        network = self.for_target(text_config, rank=4, parent_rank=4, image_tokens=2, **changes)
        network.choose_draft_vocabulary(torch.arange(text_config.vocab_size))
        return network

    def begin_from(self, model: PreTrainedModel) -> None:
        """Copies the target's rows to the output layer, and the target's final norm to its norm."""
        rows = output_layer(model).weight.detach()[self.ids.to(model.device)]
        with torch.no_grad():
            self.heads.head.weight.copy_(rows)
            # the rows expect states of the target's scale; norm(1) is that scale, also where weights are offsets from
            # one (Gemma)
            self.heads.norm.weight.copy_(final_norm(text_decoder(model))(torch.ones_like(rows[0])))

    def choose_draft_vocabulary(self, ids: Tensor) -> None:
        """See `DraftNetwork`."""
        self.heads.ids = ids.to(torch.long)

    @property
    def ids(self) -> Tensor:
        """[Vd] int64: the target's id of each draft token."""
        return self.heads.ids

    def uncalibrated(self, node: NodeFeatures) -> Tensor:
        """See `DraftNetwork`; older folders hold their calibration as a tensor."""
        return log_chance(dict(zip(STORED, self.heads.calibration.unbind(), strict=True)), node)

    def attach(self, model: PreTrainedModel, name: str | None = None) -> Self:
        """See `DraftNetwork`."""
        self.words = None
        return super().attach(model, name)

    def pack(self, dtype: torch.dtype = torch.float32) -> None:
        """See `DraftNetwork`; in the block form it also prepares `Words`."""
        super().pack(dtype)
        if self.heads.experts is not None:
            self.heads.experts.pack()
        if self.config.form == "block":
            self.words = Words.of(self)

    def embed(self, tokens: Tensor) -> Tensor:
        """Returns normalised target embeddings [..., H] of token ids [...]: their scale is a tenth of the states'."""
        return self.word_norm(self._target[0](tokens).to(self.fuse.weight.dtype))

    def feature(self, taps: Tensor) -> Tensor:
        """Fuses tap states [..., T*H] to features [..., H]."""
        return self.fuse(self.tap_norm(taps.to(self.fuse.weight.dtype)))

    def drafted_feature(self, state: Tensor) -> Tensor:
        """See `SelfFed`; a linear map of the draft state."""
        return self.feature_state(state)

    def entry(self, feature: Tensor, embedding: Tensor, image: Tensor, level: int = 0) -> Tensor:
        """[emb; feature + image_fc(image)], or its map; `image` is zero before images and without auxiliary tokens."""
        seen = feature if self.image_fc is None else feature + self.image_fc(image)
        if self.config.pair:
            out = torch.cat([embedding, seen], -1)
        else:
            out = self.fc(torch.cat([self.feature_norm(seen), embedding], -1))
        return out.to(self.fuse.weight.dtype)  # under autocast residual sums keep the precision of the weights

    def enter(self, selection: Selection, feature: Tensor) -> Tensor:
        """See `DraftNetwork`."""
        if selection.given is not None:
            selection = replace(selection, given=self._in_place_of_text(selection.given))
        return super().enter(selection, feature)

    def _in_place_of_text(self, kept: Tensor) -> Tensor:
        """Makes entries of tokens [..., H] that are no text, which have no embedding."""
        return F.pad(kept, (self.config.hidden, 0)) if self.config.pair else kept

    def route(self, feature: Tensor, embedding: Tensor) -> Tensor:
        """Predicts the log-probabilities [..., M] of the modality of the token after next; uniform without a router."""
        if self.router is None:
            M = len(self.config.modalities)
            return feature.new_full((*feature.shape[:-1], M), 1.0 / M).log()
        logits: Tensor = self.router(feature, embedding)
        return logits.log_softmax(-1)

    def probabilities(self, feature: Tensor, embedding: Tensor) -> Tensor:
        """Predicts the probabilities [..., M] of `route`."""
        if self.router is None:
            return self.route(feature, embedding).exp()
        logits: Tensor = self.router(feature, embedding)
        return logits.softmax(-1)

    @property
    def routes_below(self) -> bool:
        """Whether nodes below the first level have a route of their own; only the mixture of experts reads it."""
        return self.router is not None and self.heads.experts is not None

    def routed(self, anchor: Anchors) -> Tensor:
        """Predicts the modality probabilities [B, M] of the first draft token of each row."""
        return self.probabilities(anchor.feature, anchor.embedding)[:, 0]

    def end_inputs(self, taps: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """See `DraftNetwork`; the fused feature."""
        return self.feature(taps), self.embed(tokens)

    def classes(self, tree: DraftTree, taps: Tensor, root: Tensor) -> Tensor:
        """Predicts the modality of the token below each node from the target's states: [B, N] registry ids.

        taps: [B, N, T*H], its states at the nodes. root: [B, 1, H], the fused feature before the root.
        """
        above = root
        if tree.size > 1:
            above = pick(self.feature(taps), tree.parents.clamp_min(0))
            above = torch.where((tree.parents < 0)[..., None], root, above)
        classes = self.route(above, self.embed(tree.tokens)).argmax(-1)
        return torch.tensor(self.config.modality_ids, device=classes.device)[classes]

    def anchors(self, batch: TeacherBatch, roots: Tensor) -> Anchors:
        """See `DraftNetwork`; a training batch may have auxiliary tokens of parts that this network lacks."""
        if batch.auxiliary is not None:
            batch = replace(batch, auxiliary=batch.auxiliary[:, : sum(n for n, _ in self.config.auxiliary)])
        return super().anchors(batch, roots)

    def read(self, layout: Layout, taps: Tensor, prompt: int | None = None, auxiliary: Tensor | None = None) -> Entries:
        """See `DraftNetwork`; kept auxiliary tokens precede the text, and their global vector joins the image's."""
        selection = self.select(layout, taps, taps.shape[1] if prompt is None else prompt)
        if self.readout is not None:
            order = left_aligned(visual := visual_columns(layout, taps.shape[1]))
            selection.seen = self.readout.read(self.feature(pick(taps, order)), visual.gather(1, order))
        feature = self.feature(selection.taps)
        kept = None
        if auxiliary is not None and self.auxiliary_adaptor is not None:
            present = auxiliary.flatten(1).any(1, keepdim=True)
            kept, vector = self.auxiliary_adaptor(auxiliary)
            selection.image = selection.image + vector.to(selection.image.dtype) * present[..., None]
        entries = Entries(selection, self.enter(selection, feature), feature)
        return entries if kept is None else _preceded(entries, self._in_place_of_text(kept), present)

    def select(self, layout: Layout, taps: Tensor, prompt: int) -> Selection:
        """See `DraftNetwork`; text keeps its place and position.

        Of each image, only `image_tokens` compressed tokens remain, at its last columns (decoupled vision path).
        Without that path, image columns are entries like any other.
        """
        c, L, dtype = self.config, taps.shape[1], self.fuse.weight.dtype
        real, embedding = real_columns(layout, L), self.embed(layout.tokens[:, 1 : L + 1])
        visual = visual_columns(layout, L)
        columns = Columns(taps, embedding, real, visual, layout.positions_1d()[:, :L], prompt)
        vector = taps.new_zeros(len(taps), 1, c.hidden, dtype=dtype)
        images = Images.of(visual, taps) if c.vision else None
        if images is None:
            selection, _ = select_columns(columns, real)
            selection.image = vector
            return selection
        count = len(images.spans)
        tokens, vectors = self.adaptor(images.states.to(dtype), images.mask)
        selection, order = images.replaced(columns, tokens, [c.image_tokens] * count)
        share = vector.new_zeros(len(taps), count).index_put_((images.rows, torch.arange(count)), vector.new_ones(()))
        vector = (share / share.sum(1, keepdim=True).clamp_min(1) @ vectors)[:, None]
        after = (visual.cumsum(1) > 0).gather(1, order)[..., None]  # the first image
        selection.image = vector * after.to(dtype)
        return selection

    def looked(self, states: Tensor, seen: Seen | None) -> Tensor:
        """Adds what the image says to draft states [B, ..., H], if the network has a read-out."""
        return states if self.readout is None or seen is None else self.readout(states, seen)

    def block(self, anchors: Anchors) -> Tensor:
        """Computes the states of all depths in one pass: [B, A, D, H]; state d-1 drafts the d-th token."""
        D = len(self.depths)
        h = anchors.x[:, :, None] + self.depths
        positions = anchors.positions[..., None] + torch.arange(D, device=h.device)
        return self.run_anchors(h, positions, anchors)

    def levels(self, anchors: Anchors, newest: Tensor) -> Levels:
        """See `DraftNetwork`."""
        if self.config.form == "block":
            return BlockLevels(self, anchors)
        return ArLevels(self, anchors, newest)

    def draft_states(self, anchors: Anchors, batch: TeacherBatch, roots: Tensor, depth: int) -> Tensor:
        """See `DraftNetwork`."""
        if self.config.form == "block":
            return self.block(anchors)[:, :, :depth]
        return super().draft_states(anchors, batch, roots, depth)


def _preceded(entries: Entries, kept: Tensor, present: Tensor) -> Entries:
    """Prepends the entries `kept` [B, K, ...] at the first position, in rows that are `present` [B, 1] bool."""
    B, K, s = len(kept), kept.shape[1], entries.selection
    zero = kept.new_zeros(B, K, entries.feature.shape[-1])
    all_present = torch.cat([present.expand(-1, K), s.present], 1)
    order = left_aligned(all_present)

    def joined(new: Tensor, old: Tensor) -> Tensor:
        return pick(torch.cat([new.to(old.dtype), old], 1), order)

    selection = replace(
        s, embedding=joined(zero, s.embedding), positions=joined(s.positions[:, :1].expand(-1, K), s.positions),
        image=s.image if s.image.shape[1] == 1 else joined(zero, s.image),
        present=all_present.gather(1, order), slot=s.slot + K * present,
    )  # fmt: skip
    return Entries(selection, joined(kept, entries.x), joined(zero, entries.feature))


class ArLevels(SelfFedLevels):
    """The distributions of one step in the ar form, under modality weights (see `Levels`)."""

    network: MSDNetwork

    def root(self, weights: Tensor) -> Distributions:
        """See `Levels`."""
        self.weights, F = weights, weights.shape[1]
        self.states = self.states.expand(-1, F, -1)
        return self._weighted(self.anchors.embedding.expand(-1, F, -1), weights)

    def below(self, tokens: Tensor, above: Tensor) -> Distributions:
        """See `Levels`."""
        feature, embedding = self.descend(tokens, above)
        if self.network.heads.experts is None:
            self.weights = inherited(self.weights, above)
        else:
            self.weights = self.network.probabilities(feature, embedding)
        return self._weighted(embedding, self.weights)

    def _weighted(self, parent: Tensor, weights: Tensor) -> Distributions:
        heads = self.network.heads
        z = heads.mixed(self.network.looked(self.states, self.anchors.seen), self.anchors.image, weights)
        return Distributions(heads.head(z), heads.confidence_logits(z, parent), weights)
