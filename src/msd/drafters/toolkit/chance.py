"""Node chances: the probability that a drafted token is the target's choice, given that its parent was.

A draft probability q is no such chance: a tree scored by log q ends early where q is too low. A logistic model over
a few features of a node, fitted on the target's greedy answers (`msd.drafters.toolkit.calibration`), predicts it. The
model is a mapping from features to weights; a new feature is a line in `FEATURES`, and a field of `NodeFeatures`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Mapping[str, float | Tensor]  # by the name of a feature


@dataclass(frozen=True)
class NodeFeatures:
    """What the chance of a candidate is computed from; all broadcast to the shape of `log_q`.

    log_q: its log draft probability. confidence: its parent's confidence logit. best: log draft probability of its
    parent's likeliest child; None where it is not known.
    """

    log_q: Tensor
    confidence: Tensor
    best: Tensor | None = None


def log_odds(log_q: Tensor) -> Tensor:
    """Computes logit(q) from log q, with q between 10⁻⁶ and 1 - 10⁻⁶."""
    return log_q.exp().logit(1e-6)


FEATURES: dict[str, Callable[[NodeFeatures], Tensor | float]] = {
    "log_odds": lambda node: log_odds(node.log_q),
    "confidence": lambda node: node.confidence,
    "best": lambda node: 0.0 if node.best is None else log_odds(node.best),
    "first": lambda node: 0.0 if node.best is None else node.log_q >= node.best,
    "bias": lambda node: 1.0,
}


def log_chance(weights: Weights, node: NodeFeatures) -> Tensor:
    """Computes log σ(Σ weight · feature), the log-probability that a candidate is the target's choice."""
    logit: Tensor | float = 0.0
    for name, weight in weights.items():
        feature = FEATURES[name](node)
        if all(isinstance(x, Tensor) for x in (logit, feature)) and isinstance(weight, float):
            logit = torch.add(logit, feature, alpha=weight)
        else:
            logit = logit + weight * feature
    return F.logsigmoid(torch.as_tensor(logit))
