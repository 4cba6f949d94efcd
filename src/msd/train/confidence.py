"""How surely a drafted token is the target's choice: a logistic fit on held-out answers that shapes the trees."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from msd.drafters.msd.heads import log_odds
from msd.targets.teacher import Lesson
from msd.train.draft_loss import DraftObjective
from msd.train.router_report import calibration_error

CANDIDATES = 4  # per position, the likeliest


@torch.no_grad()
def candidates(objective: DraftObjective, lessons: Iterable[tuple[Lesson, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """(log q [n], confidence logit of the parent [n], hit [n] bool) of the likeliest candidates at every position.

    The answers must be the target's greedy ones; paths above a candidate are the answer's own, as for a tree node whose
    parent was accepted.
    """
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for lesson, _ in lessons:
        drafts, states = objective.everywhere(lesson)
        logits, sure = objective.logits(lesson, drafts, states, objective.routes(lesson, drafts, states).exp())
        log_q, index = logits.float().log_softmax(-1).topk(min(CANDIDATES, logits.shape[-1]), -1)
        hit = objective.network.heads.ids[index] == drafts.read(lesson.answers)[..., None]
        keep = drafts.valid[..., None].expand_as(hit)
        found.append((log_q[keep], sure[..., None].expand_as(log_q)[keep], hit[keep]))
    log_q, sure, hit = (torch.cat(parts) for parts in zip(*found, strict=True))
    return log_q, sure, hit


def calibrate(objective: DraftObjective, lessons: Iterable[tuple[Lesson, Tensor]]) -> dict[str, Any]:
    """Fits `Heads.calibration` in place; reports the calibration error (0 to 1) of log q alone and of the fit."""
    heads = objective.network.heads
    log_q, sure, hit = (x.detach().cpu() for x in candidates(objective, lessons))
    features = torch.stack([log_odds(log_q), sure.float(), torch.ones_like(log_q)], -1)
    fit = torch.tensor([1.0, 0.0, 0.0], requires_grad=True)
    solver = torch.optim.LBFGS([fit], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = F.binary_cross_entropy_with_logits(features @ fit, hit.float()) + 1e-4 * fit.square().sum()
        value.backward()
        return value

    solver.step(loss)
    with torch.no_grad():
        heads.calibration.copy_(fit.detach())
    return {
        "candidates": len(hit),
        "ece_of_q": calibration_error(log_q.exp(), hit),
        "ece": calibration_error(torch.sigmoid(features @ fit.detach()), hit),
        "fit": [round(float(x), 4) for x in fit.detach()],
    }
