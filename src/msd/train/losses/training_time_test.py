"""EAGLE-3's loss: training-time test, cross entropy on levels that the drafter feeds itself (arXiv 2503.01840)."""

from __future__ import annotations

import torch
from torch import Tensor

from msd.drafters.toolkit.network import DraftNetwork, Parts
from msd.drafters.toolkit.training import Truth
from msd.targets.teacher import Lesson
from msd.train.losses.terms import soft_entropy

DECAY = 0.8  # of a level's weight


def training_time_test_loss(network: DraftNetwork, lesson: Lesson, first: Tensor) -> tuple[Tensor, Parts]:
    """Cross entropy to the target's distribution within the draft vocabulary; level i of `reach` weighs 0.8^i.

    A position counts where the target's choice is in the vocabulary: the answer's token, answers being greedy.
    """
    reach = network.reach
    truth = Truth.of(lesson, first, reach, network.config.hidden)
    logits = network.logits(network.states(lesson, first, reach), truth.token)
    entropy = soft_entropy(logits, truth.p / truth.p.sum(-1, keepdim=True).clamp_min(1e-9))
    counts = (truth.valid & torch.isin(truth.token, network.ids)).to(entropy.dtype)
    each = (entropy * counts).sum((0, 1)) / counts.sum((0, 1)).clamp_min(1)
    loss = (each * DECAY ** torch.arange(reach, device=each.device)).sum()
    return loss, {"first": each[0], "last": each[-1]}
