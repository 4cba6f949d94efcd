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
from msd.drafters.toolkit.chance import NodeFeatures, corrected
from msd.drafters.toolkit.context import Anchors, pick
from msd.drafters.toolkit.growth import Distributions
from msd.drafters.toolkit.levels import Block, BlockLevels
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
        rank, c, v = int(config.options["markov_rank"]), config, config.variant
        if v.markov != "none":
            self.markov_in = nn.Embedding(c.vocabulary, rank)
            self.markov_out = Linear(rank, c.draft_vocabulary, bias=False)
            nn.init.normal_(self.markov_in.weight, std=0.02)
            nn.init.normal_(self.markov_out.weight, std=0.02)
        if v.confidence != "none":
            self.confidence = nn.Linear(c.hidden + (rank if v.confidence == "markov" else 0), 1)
        if v.markov == "gated":
            self.markov_gate = nn.Linear(c.hidden + rank, rank)
        if v.markov == "rnn":
            self.markov_joint = nn.Linear(c.hidden + 2 * rank, 3 * rank)

    def logits(self, states: Tensor, parents: Tensor) -> Tensor:
        """See `DraftNetwork`; base logits plus the Markov term of the parent.

        A gate may scale the term, and a recurrent head reads all tokens along the second last axis, from the root.
        """
        kind = self.config.variant.markov
        if kind == "none":
            return self.head(states)
        above = self._above(parents)
        if kind == "gated":
            above = torch.sigmoid(self.markov_gate(torch.cat([states, above], -1))) * above
        if kind == "rnn":
            memory, terms = torch.zeros_like(above[..., 0, :]), []
            for level in range(above.shape[-2]):
                memory, term = self.remember(memory, states[..., level, :], parents[..., level])
                terms.append(term)
            above = torch.stack(terms, -2)
        return self.head(states) + self.markov_out(above)

    def remember(self, memory: Tensor, states: Tensor, parents: Tensor) -> tuple[Tensor, Tensor]:
        """Runs one step of a recurrent Markov head (released code, "rnn").

        memory: [..., rank], of the path above. Returns (the memory below, what W2 reads [..., rank]).
        """
        joint = self.markov_joint(torch.cat([memory, self._above(parents), states], -1))
        gate, candidate, term = joint.chunk(3, -1)
        gate = torch.sigmoid(gate)
        return gate * memory + (1 - gate) * torch.tanh(candidate), torch.tanh(term)

    def levels(self, anchors: Anchors, newest: Tensor) -> BlockLevels:
        """See `DraftNetwork`."""
        if self.config.variant.markov != "rnn":
            return super().levels(anchors, newest)
        return RecurrentLevels(self, self.block(anchors, self.config.depth)[:, 0], newest)

    def _above(self, parents: Tensor) -> Tensor:
        """Returns W1 of parent tokens [...]: [..., rank]; ids above its rows are padding of the target's."""
        return self.markov_in(parents.clamp_max(len(self.markov_in.weight) - 1))

    @property
    def confident(self) -> bool:
        """See `DraftNetwork`."""
        return self.config.variant.confidence != "none"

    def confidence_logits(self, states: Tensor, parents: Tensor) -> Tensor:
        """See `DraftNetwork`."""
        reads = self.config.variant.confidence
        if reads == "none":
            return super().confidence_logits(states, parents)
        return self.confidence(torch.cat([states, self._above(parents)], -1) if reads == "markov" else states).squeeze(
            -1
        )

    def uncalibrated(self, node: NodeFeatures) -> Tensor:
        """See `DraftNetwork`; log(q · confidence)."""
        chance = node.log_q + F.logsigmoid(node.confidence) if self.confident else node.log_q
        return corrected(chance, node.correction)


class RecurrentLevels(BlockLevels):
    """The distributions of a recurrent Markov head, whose memory follows each path of the tree."""

    network: DSpark

    def __init__(self, network: DSpark, states: Tensor, newest: Tensor) -> None:
        super().__init__(network, states, newest)
        self.memory = states.new_zeros(len(states), 1, network.markov_in.embedding_dim)

    def root(self, weights: Tensor) -> Distributions:
        """See `Levels`."""
        found = super().root(weights)
        self.memory = self.memory.expand(-1, weights.shape[1], -1)
        return found

    def below(self, tokens: Tensor, above: Tensor) -> Distributions:
        """See `Levels`."""
        self.memory = pick(self.memory, above)
        return super().below(tokens, above)

    def _distributions(self, tokens: Tensor) -> Distributions:
        network, states = self.network, self.states
        self.memory, term = network.remember(self.memory, states, tokens)
        logits = network.head(states) + network.markov_out(term)
        return Distributions(logits, network.confidence_logits(states, tokens), self.weights)
