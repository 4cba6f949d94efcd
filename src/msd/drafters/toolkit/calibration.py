"""Calibrates tree scores: a logistic model of a draft token's log q and its parent's confidence logit.

Its output is the probability that the token is the target's choice.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BINS = 10  # of the calibration error


def log_odds(log_q: Tensor) -> Tensor:
    """Computes logit(q) from log q; finite at q = 1."""
    return log_q - torch.log1p(-log_q.exp().clamp(max=1 - 1e-6))


def calibrated(fit: Tensor, log_q: Tensor, confidence: Tensor) -> Tensor:
    """Computes the log-probability that a token is the target's choice: log σ(a·logit(q) + b·confidence + c).

    fit: [3], (a, b, c); with (1, 0, 0) the result is log q. confidence: the parent's confidence logit.
    """
    slope, weight, bias = fit.unbind()
    return F.logsigmoid(slope * log_odds(log_q) + weight * confidence + bias)


def fitted(log_q: Tensor, confidence: Tensor, correct: Tensor) -> tuple[Tensor, Tensor]:
    """Fits the model to n candidates; returns (fit [3], the fitted probabilities [n]).

    log_q, confidence: [n]. correct: [n] bool, whether the candidate was the target's choice.
    """
    features = torch.stack([log_odds(log_q), confidence.float(), torch.ones_like(log_q)], -1)
    fit = torch.tensor([1.0, 0.0, 0.0], requires_grad=True)
    solver = torch.optim.LBFGS([fit], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = F.binary_cross_entropy_with_logits(features @ fit, correct.float()) + 1e-4 * fit.square().sum()
        value.backward()
        return value

    solver.step(loss)
    return fit.detach(), torch.sigmoid(features @ fit.detach())


def calibration_error(probability: Tensor, correct: Tensor) -> float:
    """Computes the expected calibration error (Guo et al. 2017, section 2), from 0 to 1, over `BINS` equal bins.

    probability: [n], the predicted probability of being correct. correct: [n] bool.
    """
    bins = (probability * BINS).long().clamp_max(BINS - 1)
    gaps = probability.new_zeros(BINS).index_add(0, bins, probability - correct.to(probability.dtype))
    return float(gaps.abs().sum()) / max(1, len(correct))
