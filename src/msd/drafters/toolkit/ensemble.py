"""Several second models draft one tree together: a mixture, weighted by how well each predicted the target's tokens.

The mixture is q = Σ w_v · q_v. After each step, log w_v becomes `MEMORY` · log w_v + Σ log q_v(token) over the tokens
that the target emitted, so the weight moves to the members that would have had them accepted, for each row of its own.
TABED (Lee et al., arXiv 2601.20357) also mixes drafts from several inputs and adapts the mixture to past tokens; this
rule is a Bayesian mixture that forgets. Its weights need no pass: members score the emitted tokens anyway.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from msd.core.layout import Layout
from msd.core.sampling import Sampler
from msd.core.tree import DraftTree
from msd.drafters.toolkit.chained import ChainedLevels, draft
from msd.drafters.toolkit.context import pick
from msd.drafters.toolkit.growth import DraftVocabulary, Shape
from msd.drafters.toolkit.level_cost import LevelCost
from msd.drafters.toolkit.second_model import SecondModel
from msd.planning.plan import Budget

MEMORY = 0.9  # of what earlier tokens showed, for each step


@dataclass
class Ensemble:
    """The state of a mixture of V members, which have one vocabulary map.

    weights: [B, V], log weights; they sum to 1. newest: [B, V, n], each member's log-probabilities after the newest
    token of the last step; None before the first.
    """

    members: list[SecondModel]
    weights: Tensor = field(init=False)
    newest: Tensor | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        first = self.members[0]
        device, ids = first.mapping.ids.device, first.mapping.ids
        self.weights = torch.zeros(len(first.seen), len(self.members), device=device).log_softmax(-1)
        self._place = torch.full((len(first.mapping.to_drafter),), -1, device=device)  # of a token among the shared
        self._place[ids] = torch.arange(len(ids), device=device)

    def propose(
        self, layout: Layout, alive: list[int], shape: Shape, vocabulary: DraftVocabulary, budget: Budget,
        sampler: Sampler, cost: LevelCost,
    ) -> DraftTree:  # fmt: skip
        """See `SecondModel.propose`."""
        opened = [member.open(layout, alive) for member in self.members]
        newest, (self._rows, unread) = layout.newest(), opened[0]
        levels = ChainedLevels(self._score, unread, newest.device)
        outlook = partial(sampler.outlook, self._rows)
        tree = draft(levels, vocabulary, newest[self._rows], shape, budget.select(self._rows), outlook, cost)
        for member in self.members:
            member.close(self._rows, unread)
        return tree.scatter(self._rows, newest)

    def _score(self, tree: DraftTree, scored: int) -> Tensor:
        """See `chained.Score`: the log-probabilities of the mixture."""
        log_q = torch.stack([m.score(tree, scored).float().log_softmax(-1) for m in self.members], 1)  # [R, V, N, n]
        if not scored:
            self._learn(tree, log_q)
        return (log_q + self.weights[self._rows][:, :, None, None]).logsumexp(1)

    def _learn(self, chain: DraftTree, log_q: Tensor) -> None:
        """Updates the weights by a chain of emitted tokens. log_q: [R, V, N, n], after each of them."""
        rows, (R, V, N, n) = self._rows, log_q.shape
        before = torch.zeros_like(log_q[:, :, :1]) if self.newest is None else self.newest[rows][:, :, None]
        place = self._place[chain.tokens]  # [R, N]
        index = place.clamp_min(0)[:, None, :, None].expand(R, V, N, 1)
        found = torch.cat([before, log_q[:, :, :-1]], 2).gather(3, index)[..., 0]
        seen = chain.valid & (place >= 0)
        self.weights[rows] = (MEMORY * self.weights[rows] + (found * seen[:, None]).sum(2)).log_softmax(-1)
        last = (chain.valid.sum(1, keepdim=True) - 1)[:, None].expand(R, V, 1)
        ends = pick(log_q.flatten(0, 1), last.flatten(0, 1)).view(R, V, n)
        if self.newest is None:
            self.newest = ends.new_zeros(len(self.weights), V, n)
        self.newest[rows] = ends
