"""Node chances: the probability that a drafted token is the target's choice, given that its parent was.

A draft probability q is no such chance: a tree scored by log q ends early where q is too low. A logistic model over
a few features of a node, fitted on the target's greedy answers (`msd.drafters.toolkit.calibration`), predicts it. The
model is a mapping from features to weights; a new feature is a line in `FEATURES`, and a field of `NodeFeatures`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Mapping[str, float | Tensor]  # by the name of a feature


class Correction:
    """What the trust in a row makes of the log odds of its chances (`msd.core.trust`). scale, shift: [B, 1, 1]."""

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        self.scale, self._shifts = scale, {0.0: shift}

    def __call__(self, odds: Tensor, constant: float = 0.0) -> Tensor:
        """Corrects the log odds [B, F, k] + constant, with one operator but for the first time."""
        if constant not in self._shifts:
            self._shifts[constant] = self._shifts[0.0] + constant * self.scale
        return torch.addcmul(self._shifts[constant], odds, self.scale)


@dataclass(frozen=True)
class NodeFeatures:
    """What the chance of a candidate is computed from; all broadcast to the shape of `log_q`.

    log_q: its log draft probability. confidence: its parent's confidence logit. best: log draft probability of its
    parent's likeliest child; None where it is not known. correction: of the chance; None: none.
    """

    log_q: Tensor
    confidence: Tensor
    best: Tensor | None = None
    correction: Correction | None = None

    @cached_property
    def odds(self) -> Tensor:
        """`log_odds` of the candidate."""
        return log_odds(self.log_q)

    @cached_property
    def best_odds(self) -> Tensor | float:
        """`log_odds` of the likeliest child; 0 where it is not known."""
        return 0.0 if self.best is None else log_odds(self.best)


class RankedFeatures(NodeFeatures):
    """The features of all children of a node, the likeliest first, which `best` then is."""

    @cached_property
    def best_odds(self) -> Tensor:
        """See `NodeFeatures`."""
        return self.odds[..., :1]


def log_odds(log_q: Tensor) -> Tensor:
    """Computes logit(q) from log q, with q between 10⁻⁶ and 1 - 10⁻⁶."""
    return log_q.exp().logit(1e-6)


FEATURES: dict[str, Callable[[NodeFeatures], Tensor | float]] = {
    "log_odds": lambda node: node.odds,
    "confidence": lambda node: node.confidence,
    "best": lambda node: node.best_odds,
    "first": lambda node: 0.0 if node.best is None else node.log_q >= node.best,
    "bias": lambda node: 1.0,
}


def corrected(log_probability: Tensor, correction: Correction | None) -> Tensor:
    """Corrects the log odds of probabilities; returns their logarithms."""
    return log_probability if correction is None else F.logsigmoid(correction(log_odds(log_probability)))


def log_chance(weights: Weights, node: NodeFeatures) -> Tensor:
    """Computes log σ(Σ weight · feature), the log-probability that a candidate is the target's choice."""
    total: Tensor | None = None
    constant: Tensor | float = 0.0
    for name, weight in weights.items():
        feature = FEATURES[name](node)
        if not isinstance(feature, Tensor):
            constant = constant + weight * feature
        elif total is None:
            total = feature * weight
        elif isinstance(weight, Tensor):
            total = total + feature * weight
        else:
            total = torch.add(total, feature, alpha=weight)
    if node.correction is not None and total is not None and isinstance(constant, float):
        return F.logsigmoid(node.correction(total, constant))
    odds = torch.as_tensor(constant if total is None else total + constant)
    return F.logsigmoid(odds if node.correction is None else node.correction(odds))
