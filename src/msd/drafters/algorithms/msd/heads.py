"""From the layers' states to draft distributions: a reduced vocabulary, low-rank experts, confidence, router, endings.

Cross-modality transfer: every other modality's expert corrects the language expert's result instead of the bare state,
so that what the text subtree has learnt helps the vision subtree.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msd.backends.packed import Linear
from msd.drafters.algorithms.msd.config import MSDConfig
from msd.drafters.toolkit.calibration import calibrated


class Probe(nn.Module):
    """Two small layers from [feature; embedding], both [..., hidden], to `outputs` logits.

    As router it predicts the modality of the next drafted token: from [h_i; emb(y_{i+1})], the fused target state at i
    and the token after it, the class of y_{i+2}. At deeper nodes the drafter's own state stands for h. As ending it
    predicts whether y_{i+2} ends the answer, which the target's pass finds out by itself.
    """

    def __init__(self, hidden: int, outputs: int, eps: float, width: int = 64) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(2 * hidden, eps)
        self.hidden = nn.Linear(2 * hidden, width)
        self.out = nn.Linear(width, outputs)

    def forward(self, feature: Tensor, embedding: Tensor) -> Tensor:
        """feature, embedding [..., H] -> logits [..., outputs]."""
        out: Tensor = self.out(F.silu(self.hidden(self.norm(torch.cat([feature, embedding], -1)))))
        return out


class Expert(nn.Module):
    """A low-rank correction [..., in] -> [..., H] that starts as nothing."""

    def __init__(self, wide: int, hidden: int, rank: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(wide, rank, bias=False), nn.Linear(rank, hidden, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """The correction."""
        out: Tensor = self.up(self.down(x))
        return out


class Experts(nn.Module):
    """One expert per modality; all but the language one also see the image's global vector."""

    def __init__(self, config: MSDConfig) -> None:
        super().__init__()
        H = config.hidden
        self.transfer = config.transfer
        self.language = Expert(H, H, config.rank)
        self.others = nn.ModuleList(Expert(2 * H, H, config.rank) for _ in config.modalities[1:])

    def parts(self, z: Tensor, image: Tensor) -> Tensor:
        """States z [..., H], global image vector [..., H] -> [..., 1+M, H]: the state, then each expert's correction.

        What an expert mixture gives is linear in these, so logits of any mixture follow from the parts' logits.
        """
        both = torch.cat([z, image.expand_as(z)], -1)
        return torch.stack([z, self.language(z), *(expert(both) for expert in self.others)], -2)

    def coefficients(self, weights: Tensor) -> Tensor:
        """Modality weights [..., M] (sum 1) -> the parts' coefficients [..., 1+M]."""
        one = torch.ones_like(weights[..., :1])
        return torch.cat([one, one if self.transfer else weights[..., :1], weights[..., 1:]], -1)


class Heads(nn.Module):
    """State -> logits over the draft vocabulary, and the chance that a draft from here is accepted.

    In the block form all depths come from one pass, so a child does not know its parent; a low-rank term conditioned on
    the parent token, one per modality, mends that (DSpark's Markov head, here aware of modality and of the state).
    """

    ids: Tensor  # [Vd] int64: the target's id of each draft token
    calibration: Tensor  # [3]: see `hit`

    def __init__(self, config: MSDConfig) -> None:
        super().__init__()
        c, H = config, config.hidden
        self.norm = nn.RMSNorm(H, c.eps)
        self.experts = Experts(c) if c.experts else None
        self.head = Linear(H, c.draft_vocabulary, bias=False)
        self.register_buffer("ids", torch.zeros(c.draft_vocabulary, dtype=torch.long))
        self.register_buffer("calibration", torch.tensor([1.0, 0.0, 0.0]))
        self.confidence = nn.Linear(2 * H, 1)
        self.block = c.form == "block"
        if self.block:
            kinds = len(c.modalities) if c.experts else 1
            self.from_state = Linear(H, c.parent_rank, bias=False)
            self.from_parent = Linear(H, c.parent_rank * kinds, bias=False)
            self.to_words = Linear(c.parent_rank, c.draft_vocabulary, bias=False)
            nn.init.zeros_(self.to_words.weight)

    def parts(self, state: Tensor, image: Tensor) -> Tensor:
        """Trunk state [..., H] -> its parts [..., P, H] (P = 1 without experts)."""
        z = self.norm(state)
        return z[..., None, :] if self.experts is None else self.experts.parts(z, image)

    def coefficients(self, weights: Tensor) -> Tensor:
        """Modality weights [..., M] -> coefficients of the parts [..., P]."""
        return torch.ones_like(weights[..., :1]) if self.experts is None else self.experts.coefficients(weights)

    def given_parent(self, from_state: Tensor, parent: Tensor, weights: Tensor) -> Tensor:
        """The block form's term of the parent token.

        from_state [..., R]: `from_state` of the mixed parts; parent embedding [..., H]; weights [..., M] -> [..., Vd].
        """
        by_kind = self.from_parent(parent).unflatten(-1, (-1, from_state.shape[-1]))
        chosen = by_kind[..., 0, :] if self.experts is None else (weights[..., None] * by_kind).sum(-2)
        out: Tensor = self.to_words(F.silu(from_state + chosen))
        return out

    def sure(self, z: Tensor, parent: Tensor) -> Tensor:
        """Confidence logit [...]: how much of the target's distribution the draft's meets, if the parent is right."""
        out: Tensor = self.confidence(torch.cat([z, parent], -1)).squeeze(-1)
        return out

    def hit(self, log_q: Tensor, sure: Tensor) -> Tensor:
        """Log of the chance that a candidate is the target's choice, from its log q and its parent's confidence logit.

        A logistic model of logit(q) and confidence, fitted on held-out greedy answers
        (`msd.drafters.toolkit.calibration`); log q itself before that.
        """
        return calibrated(self.calibration, log_q, sure)
