"""Losses of drafts made in one block: cross entropy to the answer (DFlash), acceptance and confidence (DSpark)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from msd.drafters.toolkit.network import DraftNetwork, Parts
from msd.drafters.toolkit.training import Truth, parents
from msd.targets.teacher import TeacherBatch
from msd.train.losses.terms import distance, hard_entropy

DECAY = 4.0  # of a position's weight, exp(-k/4), as released for blocks of 7


def _weights(depth: int, device: torch.device) -> Tensor:
    return torch.exp(-torch.arange(depth, device=device) / DECAY)


def dflash_loss(network: DraftNetwork, batch: TeacherBatch, first: Tensor) -> tuple[Tensor, Parts]:
    """Cross entropy to the answer's tokens, nearer ones weighing more."""
    D = network.config.depth
    truth = Truth.of(batch, first, D, network.config.hidden)
    logits = network.head(network.states(batch, first, D))
    loss = truth.mean(hard_entropy(logits, truth.token), _weights(D, first.device))
    return loss, {"entropy": loss}


def dspark_loss(network: DraftNetwork, batch: TeacherBatch, first: Tensor) -> tuple[Tensor, Parts]:
    """0.9 × ‖p − q‖₁ + 0.1 × cross entropy to the answer's tokens + that of the confidence, weights exp(−k/4)."""
    D = network.config.depth
    truth = Truth.of(batch, first, D, network.config.hidden)
    states = network.states(batch, first, D)
    above = parents(batch, first[..., None] + torch.arange(1, D + 1, device=first.device))
    logits = network.logits(states, above)
    weight = _weights(D, first.device)
    apart = distance(logits, truth.p)
    met = (1 - apart.detach() / 2).clamp(0, 1)
    right = F.binary_cross_entropy_with_logits(network.sure(states, above).float(), met, reduction="none")
    parts = {
        "distance": truth.mean(apart, weight),
        "entropy": truth.mean(hard_entropy(logits, truth.token), weight),
        "confidence": truth.mean(right, weight),
    }
    return 0.9 * parts["distance"] + 0.1 * parts["entropy"] + parts["confidence"], parts
