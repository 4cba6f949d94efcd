"""`ar`: no drafting. One token per target pass, on the same loop and backend as every other method."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from msd.core.sampling import Sampler
from msd.core.tree import Accepted, DraftTree, Scores
from msd.drafters import registry
from msd.planning.plan import Budget
from msd.targets.state import State


class Plain:
    """Proposes nothing."""

    name = "ar"
    taps: tuple[int, ...] = ()
    sampled = False

    def attach(self, model: PreTrainedModel, backend: str = "plain") -> None:
        """Any target will do."""

    def twin(self, model: PreTrainedModel) -> Plain:
        """Another."""
        return Plain()

    def begin(self, state: State, scores: Scores) -> None:
        """Nothing to remember."""

    def propose(self, state: State, budget: Budget, sampler: Sampler) -> DraftTree:
        """The root alone."""
        return DraftTree.root_only(state.layout.newest())

    def route(self, state: State, tree: DraftTree, scores: Scores) -> Tensor | None:
        """No router."""
        return None

    def observe(self, state: State, tree: DraftTree, scores: Scores, accepted: Accepted) -> None:
        """Nothing to remember."""


registry.add(registry.Method(Plain.name, Plain))
