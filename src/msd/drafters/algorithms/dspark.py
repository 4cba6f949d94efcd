"""`dspark`: a block whose words agree with their predecessor (DSpark, DeepSeek 2026, with its released code).

Every block position drafts the token after it. A low-rank "Markov" head adds W2·W1[x_{k-1}] to the base logits of
position k, so that a tree's siblings have distributions of their own from one pass. A confidence
σ(w·[h_k; W1[x_{k-1}]]) learns the true acceptance rate 1 − ½‖p − q‖₁; it weighs what is worth verifying, against the
plan's measured cost.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msd.backends.packed import Linear
from msd.drafters.registry import learned
from msd.drafters.toolkit.levels import Block
from msd.drafters.toolkit.network import NetworkConfig
from msd.train.losses.block import dspark_loss


@learned("dspark", loss=dspark_loss)
class DSpark(Block):
    """Blind to modality. markov_rank: 256 as published; less by default, where a small target has many words."""

    width, depth = 8, 7
    offset = 1
    options: ClassVar[dict[str, float]] = {"markov_rank": 32}

    def __init__(self, config: NetworkConfig) -> None:
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
        """Log of q times the confidence: how likely the drafted token is, where the distribution is right at all."""
        return log_q + F.logsigmoid(sure)
