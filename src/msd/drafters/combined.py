"""`msd+NAME`: MSD's router and subtrees over another method's trained trunk.

The trunk's laws are blind to modality, so what the router decides is the tree: which subtrees exist, how wide and deep
each is, and how the nodes are shared. Its head for endings keeps from drafting below an answer's end. Both parts are as
they were trained, apart; nothing is trained for the combination.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from msd.drafters.msd import MSD, MSDNetwork, Shape
from msd.drafters.msd.context import pick
from msd.drafters.msd.drafter import SURELY
from msd.drafters.msd.grow import choose, grow
from msd.drafters.msd.laws import Laws, Levels
from msd.drafters.notes import Notes
from msd.drafters.rivals import Rival, RivalDrafter
from msd.drafters.rivals.memory import Memory
from msd.errors import UserError
from msd.plan import Budget
from msd.sampling import Sampler, temperature
from msd.targets.state import State
from msd.tree import Accepted, DraftTree, Scores


@dataclass
class _Memory:
    """notes: the trunk's. newest: [B, T*H], the router's states before the newest token of every row."""

    notes: Notes[Memory]
    newest: Tensor


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

    def begin(self, state: State, scores: Scores) -> None:
        """See `RivalDrafter`."""
        c = self.network.config
        if scores.taps is None or scores.taps.shape[-1] != c.hidden * len(self.taps):
            raise UserError(
                f"method '{self.name}' needs the target's states at layers {self.taps}, which were not kept"
            )
        notes: Notes[Memory] = Notes(self._of(scores.taps, c.taps), Memory.begin)
        state.memory = _Memory(notes, self._of(scores.taps[:, -1], self.msd.taps))

    def propose(self, state: State, budget: Budget, sampler: Sampler) -> DraftTree:
        """The likeliest nodes of the active modalities' subtrees, merged."""
        newest, router = state.layout.newest(), self.msd.network
        if budget.nodes < 1 or max(budget.depth, default=0) < 1:
            return DraftTree.root_only(newest)
        feature, word = router.feature(state.memory.newest), router.embed(newest)
        going = [row for row, depth in enumerate(budget.depth) if depth]
        if budget.seconds is not None and bool((router.ends(feature[going], word[going]) > SURELY).all()):
            return DraftTree.root_only(newest)
        memory = state.memory.notes.read(self.network, state.layout)
        context, visible = memory.context()
        laws = self.network.laws(context, replace(memory.anchor, visible=visible), newest)
        subtrees = choose(router.config, router.route(feature, word).exp(), budget.nodes, budget.width)
        subtrees.shapes = [Shape(s.width, min(s.depth, self.network.config.depth)) for s in subtrees.shapes]
        kinds = self.msd.modality_ids.to(newest.device)
        return grow(_Alike(laws), self.network, subtrees, kinds, newest, budget, temperature(sampler), self.pace)

    def route(self, state: State, tree: DraftTree, scores: Scores) -> Tensor | None:
        """See `MSD.route`."""
        if scores.taps is None:
            return None
        router = self.msd.network
        feature = router.feature(self._of(scores.taps, self.msd.taps))
        above = pick(feature, tree.parents.clamp_min(0))
        above = torch.where((tree.parents < 0)[..., None], router.feature(state.memory.newest)[:, None], above)
        kinds = router.route(above, router.embed(tree.tokens)).argmax(-1)
        return self.msd.modality_ids.to(kinds.device)[kinds]

    def observe(self, state: State, tree: DraftTree, scores: Scores, accepted: Accepted) -> None:
        """See `RivalDrafter`."""
        assert scores.taps is not None
        trunks = replace(scores, taps=self._of(scores.taps, self.network.config.taps))
        state.memory.notes.observe(trunks, accepted)
        for row, (nodes, tokens) in enumerate(zip(accepted.nodes, accepted.tokens, strict=True)):
            if tokens:
                last = [0, *nodes][len(tokens) - 1]
                state.memory.newest[row] = self._of(scores.taps[row, last], self.msd.taps)

    def _of(self, taps: Tensor, wanted: tuple[int, ...]) -> Tensor:
        """Those of the target's states [..., T*H] that one part reads."""
        states = taps.unflatten(-1, (len(self.taps), -1))
        return states[..., [self.taps.index(tap) for tap in wanted], :].flatten(-2)


class _Alike:
    """One trunk's laws for all subtrees, which keep their modality all the way down."""

    def __init__(self, levels: Levels) -> None:
        self.levels, self.weights = levels, torch.empty(0)
        self.at_root = True

    def root(self, weights: Tensor) -> Laws:
        """See `Levels`."""
        self.weights, F = weights, weights.shape[1]
        laws = self.levels.root(weights[:, :1, :1])
        return Laws(laws.logits.expand(-1, F, -1), laws.sure.expand(-1, F), weights)

    def below(self, tokens: Tensor, above: Tensor) -> Laws:
        """See `Levels`."""
        self.weights = pick(self.weights, above)
        laws = self.levels.below(tokens, torch.zeros_like(above) if self.at_root else above)
        self.at_root = False
        return Laws(laws.logits, laws.sure, self.weights)
