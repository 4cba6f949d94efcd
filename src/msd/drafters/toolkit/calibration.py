"""Fits the node chances of a network on the target's greedy answers (`msd.drafters.toolkit.chance`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from msd.drafters.toolkit.chance import FEATURES, NodeFeatures, Weights, log_chance
from msd.drafters.toolkit.training import Objective, all_roots, drafted, read
from msd.targets.teacher import TeacherBatch

BINS = 10  # of the calibration error
CANDIDATES = 4  # most likely tokens per position that a fit counts
RIDGE = 1e-4  # times the sum of squared weights, added to the mean log loss


@torch.no_grad()
def candidates(objective: Objective, batches: Iterable[TeacherBatch]) -> tuple[NodeFeatures, Tensor]:
    """Collects the most likely candidates of every position: (features [n] each, whether it was correct [n] bool).

    The answers must be the target's greedy ones. The path above a candidate is the answer's own, as for a tree node
    whose parent was accepted.
    """
    depth, ids = objective.network.config.depth, objective.network.ids
    found: list[tuple[Tensor, ...]] = []
    for batch in batches:
        index, valid = drafted(batch, all_roots(batch), depth)
        for d, (logits, confidence) in enumerate(objective.levels(batch, depth)):
            log_q, top = logits.float().log_softmax(-1).topk(min(CANDIDATES, logits.shape[-1]), -1)
            correct = ids[top] == read(batch.answers, index[..., d : d + 1])
            kept = valid[..., d : d + 1].expand_as(correct)
            sure = confidence.float()[..., None].expand_as(log_q)
            best = log_q[..., :1].expand_as(log_q)
            found.append(tuple(x[kept].cpu() for x in (log_q, sure, best, correct)))
    log_q, confidence, best, correct = (torch.cat(parts) for parts in zip(*found, strict=True))
    return NodeFeatures(log_q, confidence, best), correct


def fitted(node: NodeFeatures, correct: Tensor) -> dict[str, float]:
    """Fits the weights of all features that vary among n candidates, and of the bias.

    node: features [n] each. correct: [n] bool, whether the candidate was the target's choice.
    """
    columns = {name: torch.as_tensor(of(node)).expand_as(node.log_q).double() for name, of in FEATURES.items()}
    names = [name for name, column in columns.items() if name == "bias" or column.min() < column.max()]
    features = torch.stack([columns[name] for name in names], -1)
    fit = torch.tensor([float(name == "log_odds") for name in names], dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([fit], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = F.binary_cross_entropy_with_logits(features @ fit, correct.double()) + RIDGE * fit.square().sum()
        value.backward()
        return value

    solver.step(loss)
    return {name: round(float(weight), 4) for name, weight in zip(names, fit.detach(), strict=True)}


def calibration_error(probability: Tensor, correct: Tensor) -> float:
    """Computes the expected calibration error (Guo et al. 2017, section 2), from 0 to 1, over `BINS` equal bins.

    probability: [n], the predicted probability of being correct. correct: [n] bool.
    """
    bins = (probability * BINS).long().clamp_max(BINS - 1)
    gaps = probability.new_zeros(BINS).index_add(0, bins, probability - correct.to(probability.dtype))
    return float(gaps.abs().sum()) / max(1, len(correct))


def log_loss(log_probability: Tensor, correct: Tensor) -> float:
    """Computes the mean log loss in nats of predicted log-probabilities [n]; correct: [n] bool."""
    wrong = torch.log(-torch.expm1(log_probability.double().clamp_max(-1e-7)))
    return -float(torch.where(correct, log_probability.double(), wrong).mean())


def quality(weights: Weights, node: NodeFeatures, correct: Tensor) -> dict[str, Any]:
    """Compares chances with q alone: calibration error (0 to 1) and log loss (nats) of both on n candidates."""
    chance = log_chance(weights, node)
    return {
        "candidates": len(correct),
        "ece_of_q": calibration_error(node.log_q.exp(), correct),
        "ece": calibration_error(chance.exp(), correct),
        "log_loss_of_q": log_loss(node.log_q, correct),
        "log_loss": log_loss(chance, correct),
    }


def calibrate(objective: Objective, batches: Iterable[TeacherBatch]) -> dict[str, Any]:
    """Fits the network's calibration on the target's answers; returns its part of the training record.

    "calibration": the weights, by feature. "confidence": the `quality` of the fit on these answers.
    """
    node, correct = candidates(objective, batches)
    objective.network.calibration = fitted(node, correct)
    weights = objective.network.calibration
    return {"calibration": weights, "confidence": quality(weights, node, correct)}
