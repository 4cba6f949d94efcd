"""The levels of a draft in the block form: one pass for all states, then a term of the parent token for each level.

What a level reads of a parent depends on its token alone. A packed network therefore computes it once for each token of
the draft vocabulary (`Words`); a level is then a few operators on small tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from msd.drafters.toolkit.context import Anchors
from msd.drafters.toolkit.growth import Distributions
from msd.drafters.toolkit.levels import inherited

Network = Any  # an `MSDNetwork`
MOST = 1 << 15  # tokens of a table; each takes about 1 kB


def from_parent(network: Network, embedding: Tensor) -> Tensor:
    """Computes what heads read of parents [..., H]: [..., P * (R + 1)].

    For each expert `Heads.from_parent` and the part of the confidence, which is the same for all.
    """
    heads = network.heads
    by_expert = heads.from_parent(embedding).unflatten(-1, (-1, heads.from_state.out_features))
    confidence = F.linear(embedding, heads.confidence.weight.chunk(2, 1)[1], heads.confidence.bias)
    return torch.cat([by_expert, confidence[..., None, :].expand(*by_expert.shape[:-1], 1)], -1).flatten(-2)


def from_word(network: Network, embedding: Tensor) -> Tensor:
    """Computes `from_parent`, followed by what the router reads of parents [..., H] (`Probe.add`), if it is asked."""
    read = from_parent(network, embedding)
    return torch.cat([read, network.router.add(embedding, 1)], -1) if network.routes_below else read


@dataclass
class Words:
    """`from_word` of the draft vocabulary: table [Vd, W]. row: [V] int64, the row of each target id that it has."""

    table: Tensor
    row: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, network: Network) -> Words | None:
        """Reads the draft vocabulary; None if it has more than `MOST` tokens."""
        ids = network.ids
        if len(ids) > MOST:
            return None
        row = ids.new_zeros(int(ids.max()) + 1)
        row[ids] = torch.arange(len(ids), device=ids.device)
        return cls(from_word(network, network.embed(ids)), row)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Returns the rows [..., W] of tokens [...] of the draft vocabulary."""
        return F.embedding(self.row[tokens], self.table)


class BlockLevels:
    """The distributions of one step in the block form (see `Levels`)."""

    def __init__(self, network: Network, anchors: Anchors) -> None:
        self.network, self.anchors, self.depth = network, anchors, 0
        heads = network.heads
        states = network.block(anchors)[:, 0]  # [B, D, H]
        parts = heads.parts(network.looked(states, anchors.seen), anchors.image)  # [B, D, P, H]
        confidence = F.linear(parts, heads.confidence.weight.chunk(2, 1)[0])
        terms = torch.cat([heads.from_state(parts), confidence], -1)
        self.logits = heads.head(parts).unbind(1)  # of each level [B, P, Vd]
        self.terms = terms[:, :, None].unbind(1)  # of each level [B, 1, P, R + 1]
        self.weights = torch.empty(0)  # modality weights [B, F, M] of the frontier
        self.routes: tuple[Tensor, ...] = ()  # of each level but the first, what its features add to the router
        if network.routes_below:
            self.routes = network.router.add(network.feature_state(states), 0)[:, :, None].unbind(1)

    def root(self, weights: Tensor) -> Distributions:
        """See `Levels`."""
        self.weights = weights
        read = from_parent(self.network, self.anchors.embedding)
        return self._distributions(read.expand(-1, weights.shape[1], -1), weights)

    def below(self, tokens: Tensor, above: Tensor) -> Distributions:
        """See `Levels`."""
        self.depth += 1
        network = self.network
        read = from_word(network, network.embed(tokens)) if network.words is None else network.words(tokens)
        if network.heads.experts is None:
            self.weights = inherited(self.weights, above)
        elif network.router is None:
            M = len(network.config.modalities)
            self.weights = read.new_full((*tokens.shape, M), 1.0 / M)
        else:
            route = self.routes[self.depth - 1]
            read, added = read.split((read.shape[-1] - route.shape[-1], route.shape[-1]), -1)
            self.weights = network.router.finish(added + route).softmax(-1)
        return self._distributions(read, self.weights)

    def _distributions(self, read: Tensor, weights: Tensor) -> Distributions:
        """Mixes the parts under modality weights [B, F, M] (sum 1); read: [B, F, P * (R + 1)], see `from_parent`."""
        heads, terms, logits = self.network.heads, self.terms[self.depth], self.logits[self.depth]
        sizes = (terms.shape[-1] - 1, 1)
        if heads.experts is None:  # a single part
            hidden, confidence = (terms[:, :, 0] + read).split(sizes, -1)
            logits = logits + heads.to_words(F.silu(hidden))
        else:
            both = terms + read.unflatten(-1, terms.shape[2:])  # [B, F, P, R + 1]
            hidden, confidence = (weights[..., None, :] @ both).squeeze(-2).split(sizes, -1)
            logits = heads.to_words.plus(F.silu(hidden), weights @ logits)
        return Distributions(logits, confidence.squeeze(-1), weights)
