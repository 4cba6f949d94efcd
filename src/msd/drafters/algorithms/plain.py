"""`ar`: autoregressive decoding without drafts, on the same loop and backend as every other method."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from msd.core.sampling import Sampler
from msd.core.tree import Accepted, DraftTree, Scores
from msd.drafters import registry
from msd.planning.plan import Budget
from msd.targets.state import State


class Plain:
    """Drafts nothing: each step emits one token."""

    name = "ar"
    taps: tuple[int, ...] = ()
    sampled = False

    def attach(self, model: PreTrainedModel, backend: str = "plain") -> None:
        """Accepts any target."""

    def twin(self, model: PreTrainedModel) -> Plain:
        """See `Drafter`."""
        return Plain()

    def begin(self, state: State, scores: Scores) -> None:
        """Stores nothing."""

    def propose(self, state: State, budget: Budget, sampler: Sampler) -> DraftTree:
        """Returns the root alone."""
        return DraftTree.root_only(state.layout.newest())

    def route(self, state: State, tree: DraftTree, scores: Scores) -> Tensor | None:
        """Returns None: no router."""
        return None

    def observe(self, state: State, tree: DraftTree, scores: Scores, accepted: Accepted) -> None:
        """Stores nothing."""


registry.add(registry.Method(Plain.name, Plain))
