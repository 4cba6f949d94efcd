"""The training objective of an MSD network (`msd.train.losses.msd`), and the reports on a trained one.

Deeper draft positions weigh less. Router and confidence have loss terms that hardly reach the rest of the network: the
norm of embeddings, and in the block form also the map from states to features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from msd.drafters.algorithms.msd.network import MSDNetwork
from msd.drafters.toolkit import processes
from msd.drafters.toolkit.calibration import calibration_error
from msd.drafters.toolkit.context import Anchors
from msd.drafters.toolkit.training import (
    LabelledBatches,
    Objective,
    all_roots,
    drafted,
    final_states,
    parents,
    read,
)
from msd.targets.teacher import TeacherBatch
from msd.train.losses.msd import LossConfig, TaskWeights, position_losses


@dataclass
class Drafts:
    """Drafts of D tokens below A roots per row.

    anchors: of the roots. index: [B, A, D], the answer token at each draft position. valid: [B, A, D] bool.
    """

    anchors: Anchors
    index: Tensor
    valid: Tensor

    def read(self, values: Tensor) -> Tensor:
        """Gathers values of the answer tokens [B, T, ...]: [B, A, D, ...]; arbitrary where invalid."""
        return read(values, self.index)


class DraftObjective(Objective):
    """The loss of an MSD network on batches of its target, whose logits are log p over the draft vocabulary."""

    network: MSDNetwork

    def __init__(self, network: MSDNetwork, config: LossConfig | None = None, ends: Sequence[int] = ()) -> None:
        super().__init__(network, ends)
        self.config, self.depth = config or LossConfig(), network.config.depth
        self.weights = TaskWeights(network.config.modalities, self.config.weighting)
        self.modality_ids = torch.tensor(network.config.modality_ids)

    def states(self, batch: TeacherBatch, roots: Tensor) -> tuple[Drafts, Tensor]:
        """Computes the states [B, A, D, H] below the answer tokens `roots` [B, A], along the answer."""
        anchors = self.network.anchors(batch, roots)
        states = self.network.draft_states(anchors, batch, roots, self.depth)
        return Drafts(anchors, *drafted(batch, roots, self.depth)), states

    def all_states(self, batch: TeacherBatch) -> tuple[Drafts, Tensor]:
        """Computes `states` with every answer token except the last as a root."""
        return self.states(batch, all_roots(batch))

    def routes(self, batch: TeacherBatch, drafts: Drafts, states: Tensor) -> Tensor:
        """Computes router log-probabilities [B, A, D, M]; their gradient stops before the trunk."""
        anchors, network = drafts.anchors, self.network
        feature = network.feature_state(states[:, :, :-1].detach())
        if network.config.form == "ar":
            feature = feature.detach()
        feature = torch.cat([anchors.feature.detach()[:, :, None], feature], 2)
        return network.route(feature, self._parents(batch, drafts.index))

    def logits(self, batch: TeacherBatch, drafts: Drafts, states: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Computes (draft logits [B, A, D, Vd], confidence logits [B, A, D]) under modality weights [B, A, D, M]."""
        heads, parent = self.network.heads, self._parents(batch, drafts.index)
        z = heads.mixed(states, drafts.anchors.image[:, :, None], weights)
        logits = heads.head(z)
        if heads.block:
            logits = heads.parent_logits(logits, heads.from_state(z), parent, weights)
        return logits, heads.confidence_logits(z.detach(), parent)

    def forward(self, batch: TeacherBatch, labels: Tensor, roots: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Computes the loss and its parts below the answer tokens `roots` [B, A].

        labels: [B, T], modality ids of the answer tokens.
        """
        drafts, states = self.states(batch, roots)
        kind = (drafts.read(labels)[..., None] == self.modality_ids.to(labels.device)).float()  # [B, A, D, M]
        route = self.routes(batch, drafts, states)
        weights = route.detach().exp()
        if self.network.config.subtrees:  # the first level of a subtree uses its own expert
            weights = torch.cat([kind[:, :, :1], weights[:, :, 1:]], 2)
        states = self.network.looked(states, drafts.anchors.seen)
        logits, confidence = self.logits(batch, drafts, states, weights)
        c, valid, names = self.config, drafts.valid, self.network.config.modalities
        truth = drafts.read(final_states(batch, states.shape[-1]))
        # the target's last state is normalised, so the draft state is compared after the heads' norm
        each, overlap = position_losses(
            logits.float().log_softmax(-1), drafts.read(batch.logits.exp()), self.network.heads.norm(states), truth, c
        )
        weight = (c.decay ** torch.arange(self.depth, device=kind.device) * valid)[..., None]
        own = (kind * weight).sum((0, 1, 2))  # [M]
        terms = processes.ratio((each[..., None] * kind * weight).sum((0, 1, 2)), own)
        count = processes.summed(own)
        present = count > 0
        loss = self.weights(terms, count)
        router_loss = processes.mean(-(route * kind).sum(-1), valid, 1)
        unsure = F.binary_cross_entropy_with_logits(confidence, overlap, reduction="none")
        confidence_loss = processes.mean(unsure, valid, 1)
        if self.network.router is not None:
            loss = loss + c.router * router_loss
        loss = loss + c.confidence * confidence_loss + self.ending_loss(batch, roots)
        parts = {name: float(t) for name, t, n in zip(names, terms.detach(), present, strict=True) if n}
        weighting = {f"λ_{name}": float(w) for name, w in zip(names, self.weights.values().detach(), strict=True)}
        return loss, {
            **parts,
            "router": float(router_loss.detach()),
            "acceptance": float(processes.mean(overlap, valid, 1)),
            **weighting,
        }

    @property
    def modalities(self) -> Sequence[str]:
        """See `Objective`."""
        return self.network.config.modalities

    def levels(self, batch: TeacherBatch, depth: int) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Objective`; under the router's probabilities."""
        drafts, states = self.all_states(batch)
        weights = self.routes(batch, drafts, states).exp()
        logits, confidence = self.logits(batch, drafts, self.network.looked(states, drafts.anchors.seen), weights)
        yield from zip(logits.unbind(2)[:depth], confidence.unbind(2)[:depth], strict=True)

    def reports(self, batches: LabelledBatches) -> dict[str, Any]:
        """Measures the router."""
        return {} if self.network.router is None else {"router": router_report(self, batches())}

    def _parents(self, batch: TeacherBatch, index: Tensor) -> Tensor:
        """Embeds the tokens before the answer tokens `index`: [B, A, D, H]."""
        return self.network.embed(parents(batch, index))


@torch.no_grad()
def router_report(objective: DraftObjective, batches: Iterable[tuple[TeacherBatch, Tensor]]) -> dict[str, Any]:
    """Measures the router on the first draft token below every answer token of `batches` (batch, labels [B, A]).

    confusion[label][predicted]: counts, by name. accuracy; majority: that of the most frequent label. ece: calibration
    error of the predicted class's probability. deeper: accuracy on draft states, levels 2 and below.
    """
    names = objective.network.config.modalities
    parts: list[tuple[Tensor, ...]] = []
    for batch, labels in batches:
        drafts, states = objective.all_states(batch)
        route, valid = objective.routes(batch, drafts, states).exp(), drafts.valid
        kind = (drafts.read(labels)[..., None] == objective.modality_ids.to(labels.device)).long().argmax(-1)
        first, deep = valid[:, :, 0], valid[:, :, 1:]
        correct = route[:, :, 1:].argmax(-1) == kind[:, :, 1:]
        parts.append((route[:, :, 0][first], kind[:, :, 0][first], correct[deep]))
    p, y, deeper = (torch.cat(part) for part in zip(*parts, strict=True))
    M = len(names)
    confidence, guess = p.max(-1)
    confusion = torch.bincount(y * M + guess, minlength=M * M).view(M, M)
    return {
        "positions": len(y),
        "accuracy": float((guess == y).float().mean()),
        "majority": float(confusion.sum(1).max() / confusion.sum()),
        "ece": calibration_error(confidence, guess == y),
        "deeper": float(deeper.float().mean()),
        "confusion": {a: {b: int(confusion[i, j]) for j, b in enumerate(names)} for i, a in enumerate(names)},
    }
