"""The chance that a drafted node is the target's choice: a logistic model of its log q and its parent's confidence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BINS = 10  # of the calibration error


def log_odds(log_q: Tensor) -> Tensor:
    """logit(q) of log q, kept finite at q = 1."""
    return log_q - torch.log1p(-log_q.exp().clamp(max=1 - 1e-6))


def calibrated(fit: Tensor, log_q: Tensor, sure: Tensor) -> Tensor:
    """Log of the chance, from log q and the parent's confidence logit. fit: [3] of logit(q), of the latter, and bias.

    With the fit [1, 0, 0] it is log q itself.
    """
    slope, weight, bias = fit.unbind()
    return F.logsigmoid(slope * log_odds(log_q) + weight * sure + bias)


def fitted(log_q: Tensor, sure: Tensor, hit: Tensor) -> tuple[Tensor, Tensor]:
    """(the fit [3], the chances [n] by it) for candidates [n] of which `hit` [n] bool were the target's choice."""
    features = torch.stack([log_odds(log_q), sure.float(), torch.ones_like(log_q)], -1)
    fit = torch.tensor([1.0, 0.0, 0.0], requires_grad=True)
    solver = torch.optim.LBFGS([fit], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = F.binary_cross_entropy_with_logits(features @ fit, hit.float()) + 1e-4 * fit.square().sum()
        value.backward()
        return value

    solver.step(loss)
    return fit.detach(), torch.sigmoid(features @ fit.detach())


def calibration_error(sure: Tensor, right: Tensor) -> float:
    """Mean |confidence − accuracy| over bins of the confidence `sure` [n], weighed by size; right [n] bool."""
    place = (sure * BINS).long().clamp_max(BINS - 1)
    error = 0.0
    for b in range(BINS):
        inside = place == b
        if inside.any():
            gap = (sure[inside].mean() - right[inside].float().mean()).abs()
            error += float(gap * inside.float().mean())
    return error
