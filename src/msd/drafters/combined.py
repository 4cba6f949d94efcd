"""`msd+NAME`: MSD's router and subtrees over another method's trained trunk.

The trunk's laws are blind to modality, so what the router decides is the tree: which subtrees exist, how wide and deep
each is, and how the nodes are shared. Its head for endings keeps from drafting below an answer's end. Both parts are as
they were trained, apart; nothing is trained for the combination.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from msd.drafters.msd import MSD, MSDNetwork, Shape
from msd.drafters.msd.grow import Subtrees, choose
from msd.drafters.msd.layer import Keys
from msd.drafters.msd.network import Anchors
from msd.drafters.notes import Remembers
from msd.drafters.rivals import Rival, RivalDrafter
from msd.drafters.rivals.memory import Memory
from msd.errors import UserError
from msd.layout import Layout
from msd.plan import Budget
from msd.sampling import Sampler
from msd.targets.state import State
from msd.tree import DraftTree, Scores


class Combined(RivalDrafter):
    """Drafts with `trunk` where `router`, an MSD network for the same target, says what to draft."""

    def __init__(self, trunk: Rival, router: MSDNetwork, name: str | None = None) -> None:
        super().__init__(trunk, name or f"msd+{trunk.method}")
        if router.router is None:
            raise UserError(f"method '{self.name}' needs a router; the network given was trained without one")
        self.msd = MSD(router, self.name)
        self.taps = tuple(sorted({*trunk.config.taps, *router.config.taps}))

    def attach(self, model: PreTrainedModel, backend: str = "plain") -> None:
        """See `Drafter`."""
        super().attach(model, backend)
        self.msd.attach(model, backend)

    def twin(self, model: PreTrainedModel) -> Combined:
        """See `Drafter`."""
        return Combined(super().twin(model).network, self.msd.twin(model).network, self.name)

    def propose(self, state: State, budget: Budget, sampler: Sampler) -> DraftTree:
        """See `RivalDrafter`; nothing where the answers most likely end."""
        going = budget.rows
        if going and budget.seconds is not None:
            newest = state.layout.newest()
            if self.msd.network.all_end(self._routers(state)[going], newest[going]):
                return DraftTree.root_only(newest)
        return super().propose(state, budget, sampler)

    def remember(self, network: Rival, layout: Layout, taps: Tensor) -> Remembers:
        """The trunk's memory, which is given its own of the target's states."""
        own = self._part(network.config.taps)
        return _Memory(Memory.begin(network, layout, own(taps)), own)

    def subtrees(self, state: State, newest: Tensor, budget: Budget) -> tuple[Subtrees, Tensor]:
        """Those of the active modalities, as deep as the trunk drafts."""
        states = self._routers(state)[budget.rows]
        router, depth = self.msd.network, self.network.config.depth
        route = router.route(router.feature(states), router.embed(newest)).exp()
        found = choose(router.config, route, budget.nodes, budget.width)
        found.shapes = [Shape(s.width, min(s.depth, depth)) for s in found.shapes]
        return found, self.msd.modality_ids.to(newest.device)

    def route(self, state: State, tree: DraftTree, scores: Scores) -> Tensor | None:
        """See `Drafter`."""
        if scores.taps is None:
            return None
        router = self.msd.network
        root = router.feature(self._routers(state))[:, None]
        return router.classes(tree, self._part(self.msd.taps)(scores.taps), root)

    def _routers(self, state: State) -> Tensor:
        """The router's part of the target's states before every row's newest token."""
        return self._part(self.msd.taps)(state.memory.newest())

    def _part(self, wanted: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
        """A function from all states [..., T*H] to those that one part reads."""
        which = [self.taps.index(tap) for tap in wanted]
        return lambda taps: taps.unflatten(-1, (len(self.taps), -1))[..., which, :].flatten(-2)


@dataclass
class _Memory:
    """A trunk's memory beside a router: `own` gives the trunk's part of what was noted."""

    trunk: Memory
    own: Callable[[Tensor], Tensor]

    def upto(self, rows: list[int] | None) -> tuple[list[Keys], Anchors]:
        """The trunk's."""
        return self.trunk.upto(rows)

    def take(self, network: Rival, layout: Layout, taps: Tensor, token: Tensor, added: list[int]) -> None:
        """See `Remembers`."""
        self.trunk.take(network, layout, self.own(taps), token, added)
