"""MSD's loss: L = L_vision + λ_text·L_text + λ_fusion·L_fusion, or by default the mean over all draft positions.

The term of a modality is the mean over its draft positions of three parts: regression (SmoothL1 of the draft state to
the target's last hidden state), ‖p − q‖₁ = 2(1 − acceptance) over the draft vocabulary (ViSpec, arXiv 2509.15235,
section 3.3), and cross entropy to p.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from msd.core import modality
from msd.errors import UserError
from msd.train.losses.terms import regression

WEIGHTINGS = ("learned", "fixed", "threshold", "none")


@dataclass(frozen=True)
class LossConfig:
    """Weights of the loss parts; decay: factor per draft depth; weighting: the kind of λ (see `TaskWeights`)."""

    regression: float = 0.2
    overlap: float = 0.6
    entropy: float = 0.4
    router: float = 0.2
    confidence: float = 0.1
    decay: float = 0.8
    weighting: str = "none"


class TaskWeights(nn.Module):
    """Weights λ of the modalities relative to vision, whose weight is 1 (without vision, relative to the first).

    learned: homoscedastic uncertainty (Kendall et al. 2018): a weight exp(-s) with penalty s per modality; λ is their
    ratio, clamped to [1/2, 2], since unbounded ratios drift to the inverse ratio of the losses and favour the easiest
    modality. fixed: 1. threshold: the registry's θ. none: the loss is the mean over all positions, whatever their
    modality.
    """

    def __init__(self, modalities: tuple[str, ...], weighting: str) -> None:
        super().__init__()
        if weighting not in WEIGHTINGS:
            raise UserError(f"loss weighting '{weighting}' is unknown; choose one of {', '.join(WEIGHTINGS)}")
        self.names, self.weighting = modalities, weighting
        self.reference = modalities.index("vision") if "vision" in modalities else 0
        self.s = nn.Parameter(torch.zeros(len(modalities)), requires_grad=weighting == "learned")

    def values(self) -> Tensor:
        """Returns λ [M], in the order of the modalities."""
        if self.weighting == "threshold":
            table = [modality.get(name).threshold for name in self.names]
            table[self.reference] = 1.0
            return self.s.new_tensor(table)
        return torch.exp(self.s.detach()[self.reference] - self.s.detach()).clamp(0.5, 2.0)

    def forward(self, terms: Tensor, count: Tensor) -> Tensor:
        """Computes Σ λ·term of terms [M], plus a term of value 0 whose gradient trains s.

        count: [M], the weights of the positions that each term is the mean over; 0 where the modality does not occur.
        """
        present = count > 0
        if self.weighting == "none":
            return (terms * count).sum() / count.sum().clamp_min(1e-9)
        loss = (self.values() * terms * present).sum()
        if self.weighting == "learned":
            own = ((torch.exp(-self.s) * terms.detach() + self.s) * present).sum()
            loss = loss + own - own.detach()
        return loss


def position_losses(
    log_q: Tensor, p: Tensor, state: Tensor, truth: Tensor, config: LossConfig
) -> tuple[Tensor, Tensor]:
    """Computes (the loss [...], the overlap Σ min(p, q) [...]) of draft positions.

    log_q, p: [..., Vd] over the draft vocabulary; p sums to at most 1. state, truth: [..., H], the draft state and the
    target's last hidden state.
    """
    l1 = (p - log_q.exp()).abs().sum(-1) + (1 - p.sum(-1)).clamp_min(0)  # ‖p − q‖₁ over all tokens
    entropy = -(p * log_q).sum(-1)
    loss = config.regression * regression(state, truth) + config.overlap * l1 + config.entropy * entropy
    return loss, (1 - l1.detach() / 2).clamp(0, 1)


def msd_draft_loss(
    draft_logits: Tensor,
    target_logits: Tensor,
    draft_states: Tensor,
    target_states: Tensor,
    modalities: Tensor,
    weights: TaskWeights,
    config: LossConfig | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Computes L = Σ λ_m·L_m of plain tensors; returns (loss, its terms by modality name).

    draft_logits, target_logits: [N, V]. draft_states, target_states: [N, H]. modalities: [N] registry ids. UserError
    if shapes differ.
    """
    n = len(modalities)
    if draft_logits.shape != target_logits.shape or len(draft_logits) != n or draft_states.shape != target_states.shape:
        shapes = [list(t.shape) for t in (draft_logits, target_logits, draft_states, target_states)]
        raise UserError(f"{n} modalities need draft and target logits [{n}, V] and states [{n}, H], got {shapes}")
    each, _ = position_losses(
        draft_logits.float().log_softmax(-1), target_logits.float().softmax(-1), draft_states, target_states,
        config or LossConfig(),
    )  # fmt: skip
    ids = torch.tensor([modality.get(name).id for name in weights.names], device=modalities.device)
    kind = (modalities[:, None] == ids).to(each.dtype)
    count = kind.sum(0)
    terms = (each[:, None] * kind).sum(0) / count.clamp_min(1)
    loss = weights(terms, count)
    return loss, {name: float(t) for name, t in zip(weights.names, terms.detach(), strict=True)}
