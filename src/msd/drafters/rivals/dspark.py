"""`dspark`: a block whose words agree with their predecessor (DSpark, DeepSeek 2026, with its released code).

Every block position drafts the token after it. A low-rank "Markov" head adds W2·W1[x_{k-1}] to the base logits of
position k, so that a tree's siblings have laws of their own from one pass. A confidence σ(w·[h_k; W1[x_{k-1}]]) learns
the true acceptance rate 1 − ½‖p − q‖₁; it weighs what is worth verifying, against the plan's measured cost of it.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msd.backends.packed import Linear
from msd.drafters.rivals.block import Block
from msd.drafters.rivals.config import RivalConfig
from msd.drafters.rivals.dflash import DECAY
from msd.drafters.rivals.network import Parts
from msd.drafters.rivals.teaching import Truth, distance, hard_entropy, parents
from msd.targets.teacher import Lesson


class DSpark(Block):
    """Blind to modality. markov_rank: 256 as published; less by default, where a small target has many words."""

    method = "dspark"
    width, depth = 8, 7
    ahead = 1
    options: ClassVar[dict[str, float]] = {"markov_rank": 32}

    def __init__(self, config: RivalConfig) -> None:
        super().__init__(config)
        rank, c = int(config.options["markov_rank"]), config
        self.markov_in = nn.Embedding(c.vocabulary, rank)
        self.markov_out = Linear(rank, c.vocabulary, bias=False)
        nn.init.normal_(self.markov_in.weight, std=0.02)
        nn.init.normal_(self.markov_out.weight, std=0.02)
        self.confidence = nn.Linear(c.hidden + rank, 1)

    def logits(self, states: Tensor, parents: Tensor) -> Tensor:
        """Base logits and the term of the parent."""
        out: Tensor = self.head(states) + self.markov_out(self.markov_in(parents))
        return out

    def sure(self, states: Tensor, parents: Tensor) -> Tensor:
        """Confidence logits."""
        out: Tensor = self.confidence(torch.cat([states, self.markov_in(parents)], -1)).squeeze(-1)
        return out

    def hit(self, log_q: Tensor, sure: Tensor) -> Tensor:
        """Log of q times the confidence: how likely the drafted token is, where the law is right at all."""
        return log_q + F.logsigmoid(sure)

    def loss(self, lesson: Lesson, first: Tensor) -> tuple[Tensor, Parts]:
        """0.9 × ‖p − q‖₁ + 0.1 × cross entropy to the answer's tokens + that of the confidence, weights exp(−k/4)."""
        D = self.config.depth
        truth = Truth.of(lesson, first, D, self.config.hidden)
        states = self.states(lesson, first, D)
        above = parents(lesson, first[..., None] + torch.arange(1, D + 1, device=first.device))
        logits = self.logits(states, above)
        weight = torch.exp(-torch.arange(D, device=first.device) / DECAY)
        apart = distance(logits, truth.p)
        met = (1 - apart.detach() / 2).clamp(0, 1)
        right = F.binary_cross_entropy_with_logits(self.sure(states, above).float(), met, reduction="none")
        parts = {
            "distance": truth.mean(apart, weight),
            "entropy": truth.mean(hard_entropy(logits, truth.token), weight),
            "confidence": truth.mean(right, weight),
        }
        return 0.9 * parts["distance"] + 0.1 * parts["entropy"] + parts["confidence"], parts
