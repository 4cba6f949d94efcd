"""The protocol that every verification policy follows.

Glossary. p: the target's law at a node after all logits processors. q: the draft's law a sampled token was drawn from.
α = min(1, p/q). θ: how large α must be for a policy to accept without asking chance.
Accepted token: a drafted token that is emitted. Recovered token: drawn from the residual norm(max(p - q, 0)) after a
rejection. Bonus token: drawn from p at the end of an accepted path. All emitted tokens are followed, in order, by
exactly one that is not drafted, the recovered or bonus one, unless the text stops before it.
"""

from __future__ import annotations

from typing import Protocol

from msd.sampling import Sampler
from msd.tree import Accepted, DraftTree, Scores


class Verifier(Protocol):
    """Chooses what to emit from a scored tree, and emits it through the sampler.

    routed: whether `scores.modality` is to be filled in for it.
    """

    routed: bool

    def accept(self, tree: DraftTree, scores: Scores, sampler: Sampler) -> Accepted:
        """Walks each row's tree from the root and returns the accepted path and the emitted tokens."""
        ...
