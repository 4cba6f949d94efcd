"""What a method's loss needs of a lesson, and the terms that published losses are made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from msd.drafters.msd.context import pick
from msd.targets.teacher import Lesson


@dataclass
class Truth:
    """The target at the positions drafted below A answer tokens per row, D each.

    p: [B, A, D, Vd] its law over the draft vocabulary, summing to at most 1. state: [B, A, D, H], its final state.
    token: [B, A, D] the answer's. valid: [B, A, D] bool, False beyond the answer's end.
    """

    p: Tensor
    state: Tensor
    token: Tensor
    valid: Tensor

    @classmethod
    def of(cls, lesson: Lesson, first: Tensor, depth: int, hidden: int) -> Truth:
        """Below the answer tokens `first` [B, A]."""
        assert lesson.taps is not None
        index = first[..., None] + torch.arange(1, depth + 1, device=first.device)
        lengths = torch.tensor(lesson.lengths, device=first.device)[:, None, None]
        state = lesson.taps[:, lesson.prompt - 1 : -1, -hidden:]
        return cls(read(lesson.logits, index).exp(), read(state, index), read(lesson.answers, index), index < lengths)

    def mean(self, values: Tensor, weight: Tensor | float = 1.0) -> Tensor:
        """The mean of values [B, A, D] over valid positions, weighed."""
        w = self.valid * weight
        return (values * w).sum() / w.sum().clamp_min(1e-6)


def read(values: Tensor, index: Tensor) -> Tensor:
    """values [B, T, ...] at index [B, A, D], beyond the end the last: [B, A, D, ...]."""
    at = index.clamp(0, values.shape[1] - 1)
    return pick(values, at.flatten(1)).unflatten(1, at.shape[1:])


def parents(lesson: Lesson, index: Tensor) -> Tensor:
    """The tokens [B, A, D] before the answer tokens `index`."""
    return read(lesson.answers, index - 1)


def soft_entropy(logits: Tensor, p: Tensor) -> Tensor:
    """Cross entropy [...] of draft logits [..., V] to the target's law p."""
    return -(p * logits.float().log_softmax(-1)).sum(-1)


def hard_entropy(logits: Tensor, token: Tensor) -> Tensor:
    """Cross entropy [...] of draft logits [..., V] to the answer's tokens [...]."""
    return -logits.float().log_softmax(-1).gather(-1, token[..., None]).squeeze(-1)


def distance(logits: Tensor, p: Tensor) -> Tensor:
    """‖p − q‖₁ [...], which is 2(1 − α) for the acceptance rate α; what p lacks of 1 is out of the draft's reach."""
    return (p - logits.float().softmax(-1)).abs().sum(-1) + (1 - p.sum(-1)).clamp_min(0)


def regression(state: Tensor, truth: Tensor) -> Tensor:
    """SmoothL1 [...] of states [..., H], mean over H."""
    return F.smooth_l1_loss(state.float(), truth.float(), reduction="none").mean(-1)


def ranking(logits: Tensor, p: Tensor, k: int = 10) -> Tensor:
    """ListMLE [...] over the target's k likeliest tokens (ViSpec, released code): -log of the chance that they are
    drawn in the target's order, each from the softmax over itself and those after it.
    """
    order = p.topk(min(k, p.shape[-1]), -1).indices
    z = logits.float().gather(-1, order)
    return (z.flip(-1).logcumsumexp(-1).flip(-1) - z).sum(-1)


def eagle_terms(states: Tensor, logits: Tensor, truth: Truth) -> tuple[Tensor, dict[str, Tensor]]:
    """EAGLE's loss (2401.15077, section 3.2): SmoothL1 of states + 0.1 × cross entropy to the target's law."""
    feature, entropy = truth.mean(regression(states, truth.state)), truth.mean(soft_entropy(logits, truth.p))
    return feature + 0.1 * entropy, {"regression": feature, "entropy": entropy}
