"""How good a router is on held-out answers: confusion, calibration, and what always saying the same would give."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from msd.targets.teacher import Lesson
from msd.train.draft_loss import DraftObjective

BINS = 10


@torch.no_grad()
def router_report(objective: DraftObjective, lessons: Iterable[tuple[Lesson, Tensor]]) -> dict[str, Any]:
    """Of the first drafted token from every answer token of `lessons` (a lesson, labels [B, A] of its answer tokens).

    confusion[label][predicted]: counts, by name. accuracy; majority: that of the commonest label. ece: expected
    calibration error over 10 equal bins of the predicted class's probability (Guo et al. 2017, section 2), from 0 to 1.
    deeper: accuracy where the drafter's own states are routed, levels 2 and below.
    """
    names = objective.network.config.modalities
    said, truth, deep_said, deep_truth = [], [], [], []
    for lesson, labels in lessons:
        drafts, states = objective.everywhere(lesson)
        route = objective.routes(lesson, drafts, states).exp()
        kind = (drafts.read(labels)[..., None] == objective.kinds.to(labels.device)).long().argmax(-1)
        said.append(route[:, :, 0][drafts.valid[:, :, 0]])
        truth.append(kind[:, :, 0][drafts.valid[:, :, 0]])
        deep_said.append(route[:, :, 1:][drafts.valid[:, :, 1:]].argmax(-1))
        deep_truth.append(kind[:, :, 1:][drafts.valid[:, :, 1:]])
    p, y = torch.cat(said), torch.cat(truth)
    M = len(names)
    sure, guess = p.max(-1)
    confusion = torch.bincount(y * M + guess, minlength=M * M).view(M, M)
    return {
        "positions": len(y),
        "accuracy": float((guess == y).float().mean()),
        "majority": float(confusion.sum(1).max() / confusion.sum()),
        "ece": calibration_error(sure, guess == y),
        "deeper": float((torch.cat(deep_said) == torch.cat(deep_truth)).float().mean()),
        "confusion": {a: {b: int(confusion[i, j]) for j, b in enumerate(names)} for i, a in enumerate(names)},
    }


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
