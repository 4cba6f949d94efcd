"""MSD's network: fused target taps -> context -> states below an anchor -> draft distributions.

Position i of the text enters as x_i = fc([feature_i; emb(y_{i+1})]), feature_i being the target's fused tap states; an
image enters as a few compressed tokens. Two forms share all of it:

    ar      state s_1 at x_i drafts y_{i+2}; below, feature_state(s) stands for the feature the target has not computed
            yet (self-fed, EAGLE). One pass per level.
    block   D queries x_i + depth_d in one pass, seeing each other; words below depth 1 are then conditioned on their
            parent by a low-rank term (DFlash, DSpark). One pass for all levels.

The output layer has a reduced vocabulary and a low-rank expert per modality. Cross-modality transfer: every other
modality's expert corrects the language expert's result instead of the bare state, so that what the text subtree has
learnt helps the vision subtree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from msd.backends.packed import Linear
from msd.core.layout import Layout
from msd.core.modality import LANGUAGE
from msd.core.tree import DraftTree
from msd.drafters.algorithms.msd.config import FORMS, SWITCHES, MSDConfig, shapes_of
from msd.drafters.toolkit.calibration import calibrated
from msd.drafters.toolkit.context import Anchors, Entries, Images, left_aligned, pick, real_columns
from msd.drafters.toolkit.growth import Distributions, Levels
from msd.drafters.toolkit.layers import AuxiliaryAdaptor, Keys, Layer, TapNorm, VisionAdaptor
from msd.drafters.toolkit.levels import SelfFed, SelfFedLevels
from msd.labels.label_thresholds import EVENT_MODALITIES
from msd.targets.teacher import TeacherBatch

SURELY = 1.4  # logit of an ending from which a draft is not worth its time: a chance of 0.8


class Probe(nn.Module):
    """Two small layers from [feature; embedding], both [..., hidden], to `outputs` logits.

    As router it predicts the modality of the next drafted token: from [h_i; emb(y_{i+1})], the fused target state at i
    and the token after it, the class of y_{i+2}. At deeper nodes the drafter's own state stands for h. As ending it
    predicts whether y_{i+2} ends the answer, which the target's pass finds out by itself.
    """

    def __init__(self, hidden: int, outputs: int, eps: float, width: int = 64) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(2 * hidden, eps)
        self.hidden = nn.Linear(2 * hidden, width)
        self.out = nn.Linear(width, outputs)

    def forward(self, feature: Tensor, embedding: Tensor) -> Tensor:
        """feature, embedding [..., H] -> logits [..., outputs]."""
        out: Tensor = self.out(F.silu(self.hidden(self.norm(torch.cat([feature, embedding], -1)))))
        return out


class Expert(nn.Module):
    """A low-rank correction [..., in] -> [..., H] that starts as nothing."""

    def __init__(self, wide: int, hidden: int, rank: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(wide, rank, bias=False), nn.Linear(rank, hidden, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """The correction."""
        out: Tensor = self.up(self.down(x))
        return out


class Experts(nn.Module):
    """One expert per modality; all but the language one also see the image's global vector."""

    def __init__(self, config: MSDConfig) -> None:
        super().__init__()
        H = config.hidden
        self.transfer = config.transfer
        self.language = Expert(H, H, config.rank)
        self.others = nn.ModuleList(Expert(2 * H, H, config.rank) for _ in config.modalities[1:])

    def parts(self, z: Tensor, image: Tensor) -> Tensor:
        """States z [..., H], global image vector [..., H] -> [..., 1+M, H]: the state, then each expert's correction.

        What an expert mixture gives is linear in these, so logits of any mixture follow from the parts' logits.
        """
        both = torch.cat([z, image.expand_as(z)], -1)
        return torch.stack([z, self.language(z), *(expert(both) for expert in self.others)], -2)

    def coefficients(self, weights: Tensor) -> Tensor:
        """Modality weights [..., M] (sum 1) -> the parts' coefficients [..., 1+M]."""
        one = torch.ones_like(weights[..., :1])
        return torch.cat([one, one if self.transfer else weights[..., :1], weights[..., 1:]], -1)


class Heads(nn.Module):
    """State -> logits over the draft vocabulary, and the chance that a draft from here is accepted.

    In the block form all depths come from one pass, so a child does not know its parent; a low-rank term conditioned on
    the parent token, one per modality, mends that (DSpark's Markov head, here aware of modality and of the state).
    """

    ids: Tensor  # [Vd] int64: the target's id of each draft token
    calibration: Tensor  # [3]: see `hit`

    def __init__(self, config: MSDConfig) -> None:
        super().__init__()
        c, H = config, config.hidden
        self.norm = nn.RMSNorm(H, c.eps)
        self.experts = Experts(c) if c.experts else None
        self.head = Linear(H, c.draft_vocabulary, bias=False)
        self.register_buffer("ids", torch.zeros(c.draft_vocabulary, dtype=torch.long))
        self.register_buffer("calibration", torch.tensor([1.0, 0.0, 0.0]))
        self.confidence = nn.Linear(2 * H, 1)
        self.block = c.form == "block"
        if self.block:
            kinds = len(c.modalities) if c.experts else 1
            self.from_state = Linear(H, c.parent_rank, bias=False)
            self.from_parent = Linear(H, c.parent_rank * kinds, bias=False)
            self.to_words = Linear(c.parent_rank, c.draft_vocabulary, bias=False)
            nn.init.zeros_(self.to_words.weight)

    def parts(self, state: Tensor, image: Tensor) -> Tensor:
        """Trunk state [..., H] -> its parts [..., P, H] (P = 1 without experts)."""
        z = self.norm(state)
        return z[..., None, :] if self.experts is None else self.experts.parts(z, image)

    def coefficients(self, weights: Tensor) -> Tensor:
        """Modality weights [..., M] -> coefficients of the parts [..., P]."""
        return torch.ones_like(weights[..., :1]) if self.experts is None else self.experts.coefficients(weights)

    def given_parent(self, from_state: Tensor, parent: Tensor, weights: Tensor) -> Tensor:
        """The block form's term of the parent token.

        from_state [..., R]: `from_state` of the mixed parts; parent embedding [..., H]; weights [..., M] -> [..., Vd].
        """
        by_kind = self.from_parent(parent).unflatten(-1, (-1, from_state.shape[-1]))
        chosen = by_kind[..., 0, :] if self.experts is None else (weights[..., None] * by_kind).sum(-2)
        out: Tensor = self.to_words(F.silu(from_state + chosen))
        return out

    def sure(self, z: Tensor, parent: Tensor) -> Tensor:
        """Confidence logit [...]: how much of the target's distribution the draft's meets, if the parent is right."""
        out: Tensor = self.confidence(torch.cat([z, parent], -1)).squeeze(-1)
        return out

    def hit(self, log_q: Tensor, sure: Tensor) -> Tensor:
        """Log of the chance that a candidate is the target's choice, from its log q and its parent's confidence logit.

        A logistic model of logit(q) and confidence, fitted on held-out greedy answers
        (`msd.drafters.toolkit.calibration`); log q itself before that.
        """
        return calibrated(self.calibration, log_q, sure)


class MSDNetwork(SelfFed):
    """All weights of an MSD drafter. Its output layer is its own, over the draft vocabulary."""

    layer = Layer
    roots, stages = None, None
    reduced = routes = True
    forms, parts = FORMS, SWITCHES
    config: MSDConfig

    def __init__(self, config: MSDConfig) -> None:
        super().__init__(config)
        c, H = config, config.hidden
        self.heads = Heads(c)
        self.router = Probe(H, len(c.modalities), c.eps) if c.router else None
        self.ending = Probe(H, 1, c.eps)
        if c.vision:
            self.adaptor = VisionAdaptor(c, len(c.taps), c.image_tokens)
        self.beside = AuxiliaryAdaptor(c, c.beside) if c.beside else None
        self.image_fc = Linear(H, H, bias=False) if c.vision or c.beside else None
        if self.image_fc is not None:
            nn.init.zeros_(self.image_fc.weight)
        if c.form == "block":
            self.depths = nn.Parameter(torch.randn(c.depth, H) * 0.02)

    def add_inputs(self) -> None:
        """See `DraftNetwork`."""
        c, H, wide = self.config, self.config.hidden, self.config.hidden * len(self.config.taps)
        self.tap_norm, self.fuse = TapNorm(len(c.taps), H, c.eps), Linear(wide, H, bias=False)
        self.feature_norm, self.word_norm = nn.RMSNorm(H, c.eps), nn.RMSNorm(H, c.eps)
        self.fc = Linear(2 * H, H, bias=False)
        self.feature_state = Linear(H, H, bias=False)

    @classmethod
    def for_target(cls, text_config: Any, **changes: Any) -> Self:
        """See `DraftNetwork`; the whole vocabulary is drafted unless `draft_vocabulary` is given."""
        size = changes.pop("draft_vocabulary", text_config.vocab_size)
        return cls(MSDConfig.for_target(text_config, size, **changes))

    @classmethod
    def trained_as(cls, settings: Any, recording: tuple[tuple[int, int], ...] | None) -> dict[str, Any]:
        """See `DraftNetwork`; answers about scenes with events make its modalities those of events."""
        changes: dict[str, Any] = dict.fromkeys(settings.off, False) | {"form": settings.form}
        if recording is not None:
            names = tuple(m.name for m in EVENT_MODALITIES)
            changes |= {"modalities": names, "shapes": shapes_of(names), "beside": recording}
        return changes

    def _alike(self, text_config: Any) -> Self:
        kept = ("form", "modalities", "shapes", "shared", "active_from", *SWITCHES)
        changes = {name: getattr(self.config, name) for name in kept}
        network = self.for_target(text_config, rank=4, parent_rank=4, image_tokens=2, **changes)
        network.choose_words(torch.arange(text_config.vocab_size))
        return network

    def begin_from(self, model: PreTrainedModel) -> None:
        """The output layer begins as the target's own rows, and its norm as the target's."""
        rows = model.get_output_embeddings().weight.detach()[self.ids.to(model.device)]
        with torch.no_grad():
            self.heads.head.weight.copy_(rows)
            # those rows expect states of the target's own scale; asked of the norm itself, because Gemma's weights are
            # offsets from one
            self.heads.norm.weight.copy_(model.get_decoder().norm(torch.ones_like(rows[0])))

    def choose_words(self, ids: Tensor) -> None:
        """See `DraftNetwork`."""
        self.heads.ids = ids.to(torch.long)

    @property
    def ids(self) -> Tensor:
        """[Vd] int64: the target's id of each draft token."""
        return self.heads.ids

    def hit(self, log_q: Tensor, sure: Tensor) -> Tensor:
        """See `Heads.hit`."""
        return self.heads.hit(log_q, sure)

    def embed(self, tokens: Tensor) -> Tensor:
        """Target embeddings [..., H] of token ids [...], normalised: their own scale is a tenth of the states'."""
        out: Tensor = self.word_norm(self._target[0](tokens).to(self.fc.weight.dtype))
        return out

    def feature(self, taps: Tensor) -> Tensor:
        """Tap states [..., T*H] -> fused feature [..., H]."""
        out: Tensor = self.fuse(self.tap_norm(taps.to(self.fc.weight.dtype)))
        return out

    def drafted_feature(self, state: Tensor) -> Tensor:
        """A linear map of the draft's state."""
        out: Tensor = self.feature_state(state)
        return out

    def entry(self, feature: Tensor, word: Tensor, image: Tensor, level: int = 0) -> Tensor:
        """x [..., H]; `image` [..., H] is zero without image before it or auxiliary tokens."""
        seen = feature if self.image_fc is None else feature + self.image_fc(image)
        out: Tensor = self.fc(torch.cat([self.feature_norm(seen), word], -1))
        return out.to(self.fc.weight.dtype)  # what layers add up keeps the weights' precision under autocast

    def route(self, feature: Tensor, embedding: Tensor) -> Tensor:
        """Log-probabilities [..., M] of the class of the token after next."""
        if self.router is None:
            M = len(self.config.modalities)
            return feature.new_full((*feature.shape[:-1], M), 1.0 / M).log()
        logits: Tensor = self.router(feature, embedding)
        return logits.log_softmax(-1)

    def routed(self, anchor: Anchors) -> Tensor:
        """[B, M] probabilities of the class of the token that is drafted below the anchor of each row."""
        return self.route(anchor.feature, anchor.embedding)[:, 0].exp()

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
        above = pick(self.feature(taps), tree.parents.clamp_min(0))
        above = torch.where((tree.parents < 0)[..., None], root, above)
        kinds = self.route(above, self.embed(tree.tokens)).argmax(-1)
        return torch.tensor(self.config.modality_ids, device=kinds.device)[kinds]

    def read(self, layout: Layout, taps: Tensor, prompt: int | None = None, auxiliary: Tensor | None = None) -> Entries:
        """See `DraftNetwork`. Text positions keep their place and their rotary position.

        Of every image only `image_tokens` entries remain, at the image's last positions (decoupled vision path);
        without that path all image positions are entries like any other.
        """
        L = taps.shape[1]
        real = real_columns(layout, L)
        shown = (layout.modality[:, :L] != LANGUAGE.id) & real
        image, compressed, of_column = self._images(taps, shown)
        present = real & (~shown | (of_column >= 0)) if self.config.vision else real
        order = left_aligned(present)
        feature = self.feature(pick(taps, order))
        embedding = self.embed(layout.tokens[:, 1 : L + 1].gather(1, order))
        after = (shown.cumsum(1) > 0).gather(1, order)[..., None].to(feature.dtype)
        kept, whole, given = self._auxiliary(auxiliary, image)
        x = self.entry(feature, embedding, image * after + whole)
        if len(compressed):
            source = of_column.gather(1, order)
            x = torch.where((source >= 0)[..., None], compressed[source.clamp_min(0)].to(x.dtype), x)
        found = Entries(
            x, feature, embedding, layout.positions_1d()[:, :L].gather(1, order), present.gather(1, order),
            (present.cumsum(1) - 1).clamp_min(0), image + whole, torch.zeros_like(given, dtype=torch.long),
        )  # fmt: skip
        return found if kept is None else _preceded(found, kept, given)

    def _images(self, taps: Tensor, shown: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(global vectors [B, 1, H], compressed tokens [I*K, H], which of them each column holds [B, L] or -1)."""
        c, (B, L, _) = self.config, taps.shape
        of_column = torch.full((B, L), -1, device=taps.device)
        image = torch.zeros(B, 1, c.hidden, dtype=self.fc.weight.dtype, device=taps.device)
        found = Images.of(shown, taps) if c.vision else None
        if found is None or not found.places:
            return image, image.new_zeros(0, c.hidden), of_column
        count, K = len(found.places), c.image_tokens
        rows, columns, which = found.last([K] * count)
        of_column[rows, columns] = which[:, 0] * K + which[:, 1]
        tokens, whole = self.adaptor(found.states.to(image.dtype), found.mask)
        share = image.new_zeros(B, count).index_put_((found.rows, torch.arange(count)), image.new_ones(()))
        image = (share / share.sum(1, keepdim=True).clamp_min(1) @ whole)[:, None]
        return image, tokens.flatten(0, 1), of_column

    def _auxiliary(self, tokens: Tensor | None, image: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """(auxiliary tokens kept [B, K, H] or None, global vectors like `image`, rows that have any [B, 1])."""
        if tokens is None or self.beside is None:
            return None, torch.zeros_like(image), image.new_zeros(len(image), 1).bool()
        given = tokens.flatten(1).any(1, keepdim=True)
        kept, whole = self.beside(tokens)
        return kept, whole.to(image.dtype) * given[..., None], given

    def block(self, context: Sequence[Keys], anchors: Anchors) -> Tensor:
        """States of all depths in one pass: [B, A, D, H]; state d-1 drafts the d-th token below the root."""
        D = len(self.depths)
        h = anchors.x[:, :, None] + self.depths
        positions = anchors.positions[..., None] + torch.arange(D, device=h.device)
        mask = torch.ones(*h.shape[:3], D, dtype=torch.bool, device=h.device)
        return self.step(h, positions, context, anchors.visible, None, mask)[0]

    def levels(self, context: Sequence[Keys], anchors: Anchors, newest: Tensor) -> Levels:
        """See `DraftNetwork`."""
        if self.config.form == "block":
            return BlockLevels(self, context, anchors)
        return ArLevels(self, context, anchors, newest)

    def drafts(self, batch: TeacherBatch, first: Tensor, depth: int) -> tuple[Anchors, Tensor]:
        """(the anchors of the answer tokens `first` [B, A], the states [B, A, D, H] below them); see `states`."""
        assert batch.taps is not None
        found = self.read(batch.layout, batch.taps[:, :-1], batch.prompt, batch.beside)
        anchors = found.anchors(first + batch.prompt - 1)
        context = self.context(found.x, found.positions)
        if self.config.form == "block":
            return anchors, self.block(context, anchors)[:, :, :depth]
        return anchors, self.drafted_states(context, anchors, batch, first, depth)

    def states(self, batch: TeacherBatch, first: Tensor, depth: int) -> Tensor:
        """See `DraftNetwork`."""
        return self.drafts(batch, first, depth)[1]


def _preceded(found: Entries, kept: Tensor, given: Tensor) -> Entries:
    """The entries with `kept` [B, K, H] before them, at the first position, in the `given` [B, 1] rows."""
    K = kept.shape[1]
    zero = torch.zeros_like(found.x[:, :1]).expand(-1, K, -1)
    present = torch.cat([given.expand(-1, K), found.present], 1)
    order = left_aligned(present)
    joined = [
        torch.cat([one, two], 1)
        for one, two in (
            (kept.to(found.x.dtype), found.x), (zero, found.feature), (zero.to(found.embedding.dtype), found.embedding),
            (found.positions[:, :1].expand(-1, K), found.positions),
        )
    ]  # fmt: skip
    x, feature, embedding, positions = (pick(values, order) for values in joined)
    return replace(
        found, x=x, feature=feature, embedding=embedding, positions=positions, present=present.gather(1, order),
        slot=found.slot + K * given,
    )  # fmt: skip


class BlockLevels:
    """All depths from one pass; a level adds the term of the parent token (see `Levels`)."""

    def __init__(self, network: MSDNetwork, context: Sequence[Keys], anchors: Anchors) -> None:
        self.network, self.anchors, self.depth = network, anchors, 0
        heads = network.heads
        self.states = network.block(context, anchors)[:, 0]  # [B, D, H]
        self.parts = heads.parts(self.states, anchors.image)  # [B, D, P, H]
        self.words = heads.head(self.parts)  # [B, D, P, Vd]
        self.terms = heads.from_state(self.parts)  # [B, D, P, R]

    def root(self, weights: Tensor) -> Distributions:
        """See `Levels`."""
        return self._found(self.anchors.embedding.expand(-1, weights.shape[1], -1), weights)

    def below(self, tokens: Tensor, above: Tensor) -> Distributions:
        """See `Levels`."""
        self.depth += 1
        embedding = self.network.embed(tokens)
        state = self.network.feature_state(self.states[:, self.depth - 1, None]).expand_as(embedding)
        return self._found(embedding, self.network.route(state, embedding).exp())

    def _found(self, parent: Tensor, weights: Tensor) -> Distributions:
        heads, d = self.network.heads, self.depth
        mix = heads.coefficients(weights)  # [B, F, P]
        logits = mix @ self.words[:, d] + heads.given_parent(mix @ self.terms[:, d], parent, weights)
        return Distributions(logits, heads.sure(mix @ self.parts[:, d], parent), weights)


class ArLevels(SelfFedLevels):
    """One pass of the layers per level; distributions follow the modality weights (see `Levels`)."""

    network: MSDNetwork

    def root(self, weights: Tensor) -> Distributions:
        """See `Levels`."""
        F = weights.shape[1]
        self.states, self.lineage = self.states.expand(-1, F, -1), self.lineage.expand(-1, F, -1)
        return self._found(self.anchors.embedding.expand(-1, F, -1), weights)

    def below(self, tokens: Tensor, above: Tensor) -> Distributions:
        """See `Levels`."""
        feature, word = self.descend(tokens, above)
        return self._found(word, self.network.route(feature, word).exp())

    def _found(self, parent: Tensor, weights: Tensor) -> Distributions:
        heads = self.network.heads
        parts = heads.parts(self.states, self.anchors.image)
        z = (heads.coefficients(weights)[..., None] * parts).sum(-2)
        return Distributions(heads.head(z), heads.sure(z, parent), weights)
