"""What an MSD network is trained for (`msd.train.losses.msd`), and what is reported once it is trained.

Positions deeper in a draft count less. Router, ending and confidence have terms of their own that move nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from msd.drafters.algorithms.msd.network import MSDNetwork
from msd.drafters.toolkit.calibration import calibration_error, fitted
from msd.drafters.toolkit.context import Anchors
from msd.drafters.toolkit.training import (
    CHAIN,
    Objective,
    TeacherBatches,
    count_chain,
    drafted,
    everywhere,
    parents,
    read,
)
from msd.targets.teacher import TeacherBatch
from msd.train.losses.msd import LossConfig, TaskWeights, position_losses

CANDIDATES = 4  # per position, the likeliest: what calibration is fitted on


@dataclass
class Drafts:
    """A anchors per row with D drafted positions each.

    anchors: what the network drafts from. index: [B, A, D] which answer token is drafted. valid: [B, A, D] bool.
    """

    anchors: Anchors
    index: Tensor
    valid: Tensor

    def read(self, values: Tensor) -> Tensor:
        """Values of the answer tokens [B, T, ...] at the drafted positions: [B, A, D, ...]; any at invalid ones."""
        return read(values, self.index)


class DraftObjective(Objective):
    """The loss of a draft network on batches of its target, whose logits are log p over the draft vocabulary.

    ends: ids of the tokens that end an answer.
    """

    network: MSDNetwork

    def __init__(
        self, network: MSDNetwork, config: LossConfig, depth: int | None = None, ends: Sequence[int] = ()
    ) -> None:
        super().__init__(network)
        self.config, self.depth = config, depth or network.config.depth
        self.weights = TaskWeights(network.config.modalities, config.weighting)
        self.kinds = torch.tensor(network.config.modality_ids)
        self.end_ids = torch.tensor(list(ends), dtype=torch.long)

    def states(self, batch: TeacherBatch, first: Tensor) -> tuple[Drafts, Tensor]:
        """States [B, A, D, H] when the roots are the answer tokens `first` [B, A], deeper words as written."""
        anchors, states = self.network.drafts(batch, first, self.depth)
        return Drafts(anchors, *drafted(batch, first, self.depth)), states

    def everywhere(self, batch: TeacherBatch) -> tuple[Drafts, Tensor]:
        """`states` with every answer token but the last as a root."""
        return self.states(batch, everywhere(batch))

    def routes(self, batch: TeacherBatch, drafts: Drafts, states: Tensor) -> Tensor:
        """Router log-probabilities [B, A, D, M]; they teach the router and nothing behind it."""
        anchors, network = drafts.anchors, self.network
        feature = network.feature_state(states[:, :, :-1].detach())
        if network.config.form == "ar":
            feature = feature.detach()
        feature = torch.cat([anchors.feature.detach()[:, :, None], feature], 2)
        return network.route(feature, self._parents(batch, drafts.index))

    def endings(self, batch: TeacherBatch, drafts: Drafts) -> tuple[Tensor, Tensor]:
        """(logits [B, A] of the first drafted token being the answer's last, whether it is [B, A] bool)."""
        anchors = drafts.anchors
        said = self.network.ends(anchors.feature.detach(), anchors.embedding)
        last = torch.isin(drafts.read(batch.answers)[:, :, 0], self.end_ids.to(said.device))
        return said, last & drafts.valid[:, :, 0]

    def logits(self, batch: TeacherBatch, drafts: Drafts, states: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Draft logits [B, A, D, Vd] under modality weights [B, A, D, M], and confidence logits [B, A, D]."""
        heads = self.network.heads
        parts = heads.parts(states, drafts.anchors.image[:, None])
        z = (heads.coefficients(weights)[..., None] * parts).sum(-2)
        parent = self._parents(batch, drafts.index)
        logits = heads.head(z)
        if heads.block:
            logits = logits + heads.given_parent(heads.from_state(z), parent, weights)
        return logits, heads.sure(z.detach(), parent)

    def forward(self, batch: TeacherBatch, labels: Tensor, first: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Loss and its parts. labels [B, T] modality ids of the answer tokens; first [B, A] which of them are roots."""
        drafts, states = self.states(batch, first)
        kind = (drafts.read(labels)[..., None] == self.kinds.to(labels.device)).float()  # [B, A, D, M]
        route = self.routes(batch, drafts, states)
        weights = route.detach().exp()
        if self.network.config.subtrees:  # the first level of a subtree is its own expert's
            weights = torch.cat([kind[:, :, :1], weights[:, :, 1:]], 2)
        logits, sure = self.logits(batch, drafts, states, weights)
        c, valid, names = self.config, drafts.valid, self.network.config.modalities
        assert batch.taps is not None
        truth = drafts.read(batch.taps[:, batch.prompt - 1 : -1, -states.shape[-1] :])
        # the target's last state is normalised, so the draft's is compared as the heads see it
        each, met = position_losses(
            logits.float().log_softmax(-1), drafts.read(batch.logits.exp()), self.network.heads.norm(states), truth, c
        )
        weight = (c.decay ** torch.arange(self.depth, device=kind.device) * valid)[..., None]
        total = (kind * weight).sum((0, 1, 2))  # [M]
        terms = (each[..., None] * kind * weight).sum((0, 1, 2)) / total.clamp_min(1e-6)
        loss = self.weights(terms, total > 0)
        count = valid.sum().clamp_min(1)
        routing = -((route * kind).sum(-1) * valid).sum() / count
        confidence = (F.binary_cross_entropy_with_logits(sure, met, reduction="none") * valid).sum() / count
        loss = loss + (c.router * routing if self.network.router is not None else 0.0) + c.confidence * confidence
        said, last = self.endings(batch, drafts)
        ending = F.binary_cross_entropy_with_logits(said.float(), last.float(), reduction="none")
        loss = loss + c.ending * (ending * valid[:, :, 0]).sum() / valid[:, :, 0].sum().clamp_min(1)
        parts = {name: float(t) for name, t, n in zip(names, terms.detach(), total, strict=True) if n > 0}
        acceptance = (met * valid).sum() / count
        weighting = {f"λ_{name}": float(w) for name, w in zip(names, self.weights.values().detach(), strict=True)}
        return loss, {**parts, "router": float(routing.detach()), "acceptance": float(acceptance), **weighting}

    @torch.no_grad()
    def acceptance(self, batch: TeacherBatch, labels: Tensor, depth: int = CHAIN) -> dict[str, list[int]]:
        """[accepted, drafted] per modality name on top-1 chains from every answer token; see `count_chain`."""
        drafts, states = self.everywhere(batch)
        logits, _ = self.logits(batch, drafts, states, self.routes(batch, drafts, states).exp())
        guess = self.network.ids[logits[:, :, :depth].argmax(-1)]
        return count_chain(batch, labels, guess, self.network.config.modalities)

    def reports(self, batches: TeacherBatches) -> dict[str, Any]:
        """The fit that turns confidence into tree scores, and the router's quality."""
        told = {"confidence": calibrate(self, batches())}
        if self.network.router is not None:
            told["router"] = router_report(self, batches())
        return told

    def _parents(self, batch: TeacherBatch, index: Tensor) -> Tensor:
        """Embeddings [B, A, D, H] of the tokens before the answer tokens `index`."""
        return self.network.embed(parents(batch, index))


@torch.no_grad()
def candidates(
    objective: DraftObjective, batches: Iterable[tuple[TeacherBatch, Tensor]]
) -> tuple[Tensor, Tensor, Tensor]:
    """(log q [n], confidence logit of the parent [n], hit [n] bool) of the likeliest candidates at every position.

    The answers must be the target's greedy ones; paths above a candidate are the answer's own, as for a tree node whose
    parent was accepted.
    """
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for batch, _ in batches:
        drafts, states = objective.everywhere(batch)
        logits, sure = objective.logits(batch, drafts, states, objective.routes(batch, drafts, states).exp())
        log_q, index = logits.float().log_softmax(-1).topk(min(CANDIDATES, logits.shape[-1]), -1)
        hit = objective.network.ids[index] == drafts.read(batch.answers)[..., None]
        keep = drafts.valid[..., None].expand_as(hit)
        found.append((log_q[keep], sure[..., None].expand_as(log_q)[keep], hit[keep]))
    log_q, sure, hit = (torch.cat(parts) for parts in zip(*found, strict=True))
    return log_q, sure, hit


def calibrate(objective: DraftObjective, batches: Iterable[tuple[TeacherBatch, Tensor]]) -> dict[str, Any]:
    """Fits `Heads.calibration` in place; reports the calibration error (0 to 1) of log q alone and of the fit."""
    log_q, sure, hit = (x.detach().cpu() for x in candidates(objective, batches))
    fit, chances = fitted(log_q, sure, hit)
    objective.network.heads.calibration.copy_(fit)
    return {
        "candidates": len(hit),
        "ece_of_q": calibration_error(log_q.exp(), hit),
        "ece": calibration_error(chances, hit),
        "fit": [round(float(x), 4) for x in fit],
    }


@torch.no_grad()
def router_report(objective: DraftObjective, batches: Iterable[tuple[TeacherBatch, Tensor]]) -> dict[str, Any]:
    """How good the router is on the first drafted token from every answer token of `batches` (batch, labels [B, A]).

    confusion[label][predicted]: counts, by name. accuracy; majority: that of the commonest label. ece: expected
    calibration error over 10 equal bins of the predicted class's probability (Guo et al. 2017, section 2), from 0 to 1.
    deeper: accuracy where the drafter's own states are routed, levels 2 and below.
    """
    names = objective.network.config.modalities
    said, truth, deep_said, deep_truth = [], [], [], []
    for batch, labels in batches:
        drafts, states = objective.everywhere(batch)
        route = objective.routes(batch, drafts, states).exp()
        kind = (drafts.read(labels)[..., None] == objective.kinds.to(labels.device)).long().argmax(-1)
        said.append(route[:, :, 0][drafts.valid[:, :, 0]])
        truth.append(kind[:, :, 0][drafts.valid[:, :, 0]])
        deep_said.append(route[:, :, 1:][drafts.valid[:, :, 1:]].argmax(-1))
        deep_truth.append(kind[:, :, 1:][drafts.valid[:, :, 1:]])
    p, y = torch.cat(said), torch.cat(truth)
    M = len(names)
    sure, guess = p.max(-1)
    confusion = torch.bincount(y * M + guess, minlength=M * M).view(M, M)
    return {
        "positions": len(y),
        "accuracy": float((guess == y).float().mean()),
        "majority": float(confusion.sum(1).max() / confusion.sum()),
        "ece": calibration_error(sure, guess == y),
        "deeper": float((torch.cat(deep_said) == torch.cat(deep_truth)).float().mean()),
        "confusion": {a: {b: int(confusion[i, j]) for j, b in enumerate(names)} for i, a in enumerate(names)},
    }
