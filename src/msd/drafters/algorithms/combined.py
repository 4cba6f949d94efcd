"""`msd+NAME`: MSD's router and subtrees over another method's trained network, the trunk.

The trunk's draft distributions do not depend on modality, so the router only shapes the tree: which subtrees exist,
how wide and deep each one is, and how they share the nodes. Its ending head prevents drafts below an answer's end.
The two networks were trained separately; the combination needs no training.
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

TRUNKS = ("eagle3", "dspark")  # the best level-by-level method and the best block method


class Combined(TrainedDrafter):
    """Drafts with `trunk`; the router of `router`, an MSD network for the same target, chooses the subtrees."""

    def __init__(self, trunk: DraftNetwork, router: Any, name: str | None = None) -> None:
        super().__init__(trunk, name or f"msd+{trunk.method}")
        if router.router is None:
            raise UserError(f"method '{self.name}' needs a router; the network given was trained without one")
        self.msd = type(router).drafter(router, self.name, separate=True)
        self.modality_ids = self.msd.modality_ids
        self.fit(router.config.taps[-1])

    def fit(self, layers: int) -> None:
        """See `Drafter`."""
        super().fit(layers)
        self.taps = tuple(sorted({*self.taps, *self.msd.taps}))

    def attach(self, model: PreTrainedModel, backend: str = "plain") -> None:
        """See `Drafter`."""
        super().attach(model, backend)
        self.msd.attach(model, backend)

    def twin(self, model: PreTrainedModel) -> Combined:
        """See `Drafter`."""
        text = model.config.get_text_config(decoder=True)
        return Combined(self.network.twin(text), self.msd.network.twin(text), self.name)

    def decoded(self, state: State, taps: Tensor) -> DecodedStates:
        """Passes the trunk's taps of the target's states to its memory."""
        return DecodedStates(taps, part=self._select(self.network.config.taps))

    def all_end(self, state: State, rows: list[int]) -> bool:
        """See `TrainedDrafter`; the router's network decides."""
        return self.msd.network.all_end(self._router_states(state)[rows], state.layout.newest()[rows])

    def subtrees(self, state: State, rows: list[int], budget: Budget) -> Subtrees:
        """Chooses the subtrees of the active modalities, no deeper than the trunk drafts."""
        states, newest = self._router_states(state)[rows], state.layout.newest()[rows]
        router, depth = self.msd.network, self.network.config.depth
        subtrees: Subtrees = self.msd.choose(router.route(router.feature(states), router.embed(newest)).exp(), budget)
        subtrees.shapes = [Shape(s.width, min(s.depth, depth)) for s in subtrees.shapes]
        return subtrees

    def route(self, state: State, tree: DraftTree, scores: Scores) -> Tensor | None:
        """See `Drafter`."""
        if scores.taps is None:
            return None
        router = self.msd.network
        root = router.feature(self._router_states(state))[:, None]
        return router.classes(tree, self._select(self.msd.taps)(scores.taps), root)

    def _router_states(self, state: State) -> Tensor:
        """Returns the router's taps of the target's states before the newest token of each row."""
        return self._select(self.msd.taps)(state.memory.newest())

    def _select(self, wanted: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
        """Returns a function from all tap states [..., T*H] to those of the `wanted` taps."""
        indices = [self.taps.index(tap) for tap in wanted]
        return lambda taps: taps.unflatten(-1, (len(self.taps), -1))[..., indices, :].flatten(-2)


for _trunk in TRUNKS:
    registry.add(registry.Method(f"msd+{_trunk}", Combined, (_trunk, "msd")))
