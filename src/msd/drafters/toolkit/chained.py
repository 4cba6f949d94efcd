"""The draft distributions of a model with a key/value cache of its own.

In each step, the model reads the tokens that were emitted since its last pass, the *unread* tokens, as a chain. The
drafts hang below the last of them, the newest token. One pass scores the chain, and one more scores each level of
drafts: chain and drafts are one tree, which grows. Afterwards, the chain is committed and the drafts are dropped.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from msd.core.foresight import Outlook
from msd.core.modality import LANGUAGE
from msd.core.tree import DraftTree
from msd.drafters.toolkit.context import pick
from msd.drafters.toolkit.growth import Distributions, DraftVocabulary, Levels, Shape, Subtrees, grow
from msd.drafters.toolkit.level_cost import LevelCost
from msd.planning.plan import Budget

Score = Callable[[DraftTree, int], Tensor]
"""(tree of R rows, n) -> logits [R, N - n, Vd] after all nodes but the first n, which earlier calls have scored."""


class ChainedLevels:
    """The distributions of one step (see `msd.drafters.toolkit.growth.Levels`), for one subtree.

    unread: the unread tokens of R rows, at least one in each, ids of the target. known: [R, Vd], the logits after them
    where an earlier pass has scored them.
    """

    def __init__(
        self, score: Score, unread: list[list[int]], device: torch.device, known: Tensor | None = None
    ) -> None:
        first = torch.tensor([tokens[0] for tokens in unread], device=device)
        chain = [list(range(len(tokens) - 1)) for tokens in unread]
        self.score, self.known = score, known
        self.tree = DraftTree.from_lists(first, [tokens[1:] for tokens in unread], chain)
        self.frontier = torch.tensor([[len(tokens) - 1] for tokens in unread], device=device)  # [R, F] nodes

    def root(self, weights: Tensor) -> Distributions:
        """See `Levels`; weights [R, 1, 1]."""
        if self.known is not None:
            return distributions(self.known[:, None])
        return distributions(pick(self.score(self.tree, 0), self.frontier))

    def below(self, tokens: Tensor, above: Tensor) -> Distributions:
        """See `Levels`."""
        size = self.tree.size
        self.tree = self.tree.extended(tokens, self.frontier.gather(1, above))
        self.frontier = torch.arange(size, self.tree.size, device=tokens.device).expand_as(tokens)
        return distributions(self.score(self.tree, size))


def distributions(logits: Tensor) -> Distributions:
    """Returns the distributions of `logits` [R, F, Vd], for a drafter with one subtree and no confidence."""
    one = torch.ones_like(logits[..., 0])
    return Distributions(logits, 0 * one, one[..., None])


def draft(
    levels: Levels,
    vocabulary: DraftVocabulary,
    newest: Tensor,
    shape: Shape,
    budget: Budget,
    outlook: Callable[[int], Outlook | None],
    cost: LevelCost,
) -> DraftTree:
    """Grows one tree for each row, of the most probable nodes, below `newest` [R]. outlook: see `grow`."""
    width = shape.width if budget.width is None else min(budget.width, shape.width)
    whole = Subtrees.single(newest, Shape(width, shape.depth))
    return grow(levels, vocabulary, whole, (LANGUAGE.id,), newest, budget, outlook, cost)


def drafts(budget: Budget) -> bool:
    """Whether a step may draft anything."""
    return budget.nodes > 0 and bool(budget.rows)
