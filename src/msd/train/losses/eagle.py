"""EAGLE's loss: regression of the target's states and soft cross entropy (arXiv 2401.15077, section 3.2)."""

from __future__ import annotations

from torch import Tensor

from msd.drafters.toolkit.network import DraftNetwork, Parts
from msd.drafters.toolkit.training import Truth
from msd.targets.teacher import Lesson
from msd.train.losses.terms import regression, soft_entropy


def eagle_loss(network: DraftNetwork, lesson: Lesson, first: Tensor) -> tuple[Tensor, Parts]:
    """SmoothL1 of states + 0.1 × cross entropy, on `network.reach` levels of a draft from each root."""
    states = network.states(lesson, first, network.reach)
    return eagle_terms(states, network.head(states), Truth.of(lesson, first, network.reach, network.config.hidden))


def eagle_terms(states: Tensor, logits: Tensor, truth: Truth) -> tuple[Tensor, Parts]:
    """The same of states [B, A, D, H] with their logits [B, A, D, V]."""
    feature, entropy = truth.mean(regression(states, truth.state)), truth.mean(soft_entropy(logits, truth.p))
    return feature + 0.1 * entropy, {"regression": feature, "entropy": entropy}


def distillation_loss(network: DraftNetwork, lesson: Lesson, first: Tensor) -> tuple[Tensor, Parts]:
    """Cross entropy to the target's distribution alone, as a language model is distilled."""
    truth = Truth.of(lesson, first, 1, network.config.hidden)
    loss = truth.mean(soft_entropy(network.logits(network.states(lesson, first, 1), truth.token), truth.p))
    return loss, {"entropy": loss}
