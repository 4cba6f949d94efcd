"""`dspark`: a block whose tokens are conditioned on their parents (DSpark, DeepSeek 2026, and its released code).

Every block position drafts the token after it. A low-rank "Markov" head adds W2·W1[x_{k-1}] to the base logits of
position k, so siblings in a tree have different distributions below them after one pass. A confidence
σ(w·[h_k; W1[x_{k-1}]]) learns the acceptance rate 1 − ½‖p − q‖₁ and weights the node scores.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msd.backends.packed import Linear
from msd.drafters.registry import learned
from msd.drafters.toolkit.chance import NodeFeatures
from msd.drafters.toolkit.levels import Block
from msd.drafters.toolkit.network import NetworkConfig
from msd.train.losses.published import dspark_loss


@learned("dspark", loss=dspark_loss)
class DSpark(Block):
    """Ignores modality. markov_rank: 256 as published; less by default, for a small target with a large vocabulary."""

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
        """See `DraftNetwork`; base logits plus the Markov term of the parent."""
        return self.head(states) + self.markov_out(self.markov_in(parents))

    def confidence_logits(self, states: Tensor, parents: Tensor) -> Tensor:
        """See `DraftNetwork`."""
        return self.confidence(torch.cat([states, self.markov_in(parents)], -1)).squeeze(-1)

    def uncalibrated(self, node: NodeFeatures) -> Tensor:
        """See `DraftNetwork`; log(q · confidence)."""
        return node.log_q + F.logsigmoid(node.confidence)
