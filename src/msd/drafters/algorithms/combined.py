"""`msd+NAME`: MSD's router and subtrees over another method's trained network, the trunk.

The trunk's distributions are blind to modality, so what the router decides is the tree: which subtrees exist, how wide
and deep each is, and how the nodes are shared. Its head for endings keeps from drafting below an answer's end. Both
parts are as they were trained, apart; nothing is trained for the combination.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from msd.core.tree import DraftTree, Scores
from msd.drafters import registry
from msd.drafters.toolkit.drafter import DecodedStates, TrainedDrafter
from msd.drafters.toolkit.growth import Shape, Subtrees
from msd.drafters.toolkit.network import DraftNetwork
from msd.errors import UserError
from msd.planning.plan import Budget
from msd.targets.state import State

TRUNKS = ("eagle3", "dspark")  # the best known of either kind


class Combined(TrainedDrafter):
    """Drafts with `trunk` where `router`, an MSD network for the same target, says what to draft."""

    def __init__(self, trunk: DraftNetwork, router: Any, name: str | None = None) -> None:
        super().__init__(trunk, name or f"msd+{trunk.method}")
        if router.router is None:
            raise UserError(f"method '{self.name}' needs a router; the network given was trained without one")
        self.msd = type(router).drafter(router, self.name)
        self.modality_ids = self.msd.modality_ids
        self.taps = tuple(sorted({*trunk.config.taps, *router.config.taps}))

    def attach(self, model: PreTrainedModel, backend: str = "plain") -> None:
        """See `Drafter`."""
        super().attach(model, backend)
        self.msd.attach(model, backend)

    def twin(self, model: PreTrainedModel) -> Combined:
        """See `Drafter`."""
        text = model.config.get_text_config(decoder=True)
        return Combined(self.network.twin(text), self.msd.network.twin(text), self.name)

    def decoded(self, state: State, taps: Tensor) -> DecodedStates:
        """The trunk's memory is given its own of the target's states."""
        return DecodedStates(taps, part=self._part(self.network.config.taps))

    def all_end(self, state: State, rows: list[int]) -> bool:
        """As the router says."""
        ends: bool = self.msd.network.all_end(self._routers(state)[rows], state.layout.newest()[rows])
        return ends

    def subtrees(self, state: State, rows: list[int], budget: Budget) -> Subtrees:
        """Those of the active modalities, as deep as the trunk drafts."""
        states, newest = self._routers(state)[rows], state.layout.newest()[rows]
        router, depth = self.msd.network, self.network.config.depth
        found: Subtrees = self.msd.choose(router.route(router.feature(states), router.embed(newest)).exp(), budget)
        found.shapes = [Shape(s.width, min(s.depth, depth)) for s in found.shapes]
        return found

    def route(self, state: State, tree: DraftTree, scores: Scores) -> Tensor | None:
        """See `Drafter`."""
        if scores.taps is None:
            return None
        router = self.msd.network
        root = router.feature(self._routers(state))[:, None]
        classes: Tensor = router.classes(tree, self._part(self.msd.taps)(scores.taps), root)
        return classes

    def _routers(self, state: State) -> Tensor:
        """The router's part of the target's states before every row's newest token."""
        return self._part(self.msd.taps)(state.memory.newest())

    def _part(self, wanted: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
        """A function from all states [..., T*H] to those that one part reads."""
        which = [self.taps.index(tap) for tap in wanted]
        return lambda taps: taps.unflatten(-1, (len(self.taps), -1))[..., which, :].flatten(-2)


for _trunk in TRUNKS:
    registry.add(registry.Method(f"msd+{_trunk}", Combined, (_trunk, "msd")))
