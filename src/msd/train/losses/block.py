"""Losses of block drafters: cross entropy to the answer (DFlash), acceptance and confidence (DSpark)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from msd.drafters.toolkit.network import DraftNetwork, Parts
from msd.drafters.toolkit.training import TargetOutputs, parents
from msd.targets.teacher import TeacherBatch
from msd.train.losses.terms import distance, hard_entropy

DECAY = 4.0  # position k weighs exp(-k/4), as released for blocks of 7


def _weights(depth: int, device: torch.device) -> Tensor:
    return torch.exp(-torch.arange(depth, device=device) / DECAY)


def dflash_loss(network: DraftNetwork, batch: TeacherBatch, roots: Tensor) -> tuple[Tensor, Parts]:
    """Computes the cross entropy to the answer's tokens, with weights exp(−k/4)."""
    D = network.config.depth
    target = TargetOutputs.of(batch, roots, D, network.config.hidden)
    logits = network.head(network.states(batch, roots, D))
    loss = target.mean(hard_entropy(logits, target.token), _weights(D, roots.device))
    return loss, {"entropy": loss}


def dspark_loss(network: DraftNetwork, batch: TeacherBatch, roots: Tensor) -> tuple[Tensor, Parts]:
    """Computes 0.9 × ‖p − q‖₁ + 0.1 × cross entropy to the answer + that of the confidence, with weights exp(−k/4)."""
    D = network.config.depth
    target = TargetOutputs.of(batch, roots, D, network.config.hidden)
    states = network.states(batch, roots, D)
    above = parents(batch, roots[..., None] + torch.arange(1, D + 1, device=roots.device))
    logits, confidence = network.logits(states, above), network.confidence_logits(states, above)
    l1 = distance(logits, target.p)
    overlap = (1 - l1.detach() / 2).clamp(0, 1)
    terms = {
        "distance": l1,
        "entropy": hard_entropy(logits, target.token),
        "confidence": F.binary_cross_entropy_with_logits(confidence.float(), overlap, reduction="none"),
    }
    parts = {name: target.mean(term, _weights(D, roots.device)) for name, term in terms.items()}
    return 0.9 * parts["distance"] + 0.1 * parts["entropy"] + parts["confidence"], parts
