"""`ar`: autoregressive decoding without drafts, on the same loop and backend as every other method."""

from __future__ import annotations

from transformers import PreTrainedModel

from msd.core.sampling import Sampler
from msd.core.tree import DraftTree
from msd.drafters import registry
from msd.drafters.base import Drafter
from msd.planning.plan import Budget
from msd.targets.state import State


class Plain(Drafter):
    """Drafts nothing: each step emits one token."""

    name = "ar"
    joinable = True

    def twin(self, model: PreTrainedModel) -> Plain:
        """See `Drafter`."""
        return Plain()

    def propose(self, state: State, budget: Budget, sampler: Sampler) -> DraftTree:
        """Returns the root alone."""
        return DraftTree.root_only(state.layout.newest())

    def select(self, state: State, rows: list[int]) -> None:
        """There is no memory."""

    def join(self, state: State, other: State) -> None:
        """There is no memory."""


registry.add(registry.Method(Plain.name, Plain))
