"""A trained network at work: it drafts a tree within the plan's budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from msd.backends.packed import faster_in_bf16
from msd.core.modality import LANGUAGE
from msd.core.sampling import Sampler, temperature
from msd.core.tree import Accepted, DraftTree, Scores
from msd.drafters.toolkit.context import Anchors, pick
from msd.drafters.toolkit.growth import Distributions, LevelCost, Levels, Shape, Subtrees, grow
from msd.drafters.toolkit.layers import Keys
from msd.drafters.toolkit.memory import DecodedStates
from msd.errors import UserError
from msd.planning.plan import Budget
from msd.targets.state import State


class TrainedDrafter:
    """Drafts with a trained network; its candidates are deterministic, the tree EAGLE-2's."""

    sampled = False

    def __init__(self, network: Any, name: str | None = None) -> None:
        self.network: Any = network.eval()  # a `DraftNetwork`
        self.name, self.taps, self.cost = name or network.method, network.config.taps, LevelCost()
        self.modality_ids = torch.tensor([LANGUAGE.id])  # of the subtrees' modalities

    def attach(self, model: PreTrainedModel, backend: str = "plain") -> None:
        """Takes the target's embedding and head; UserError when the target is not the one it was trained for."""
        self.network.attach(model, self.name).to(model.device)
        if backend != "plain":
            self.network.pack(torch.bfloat16 if faster_in_bf16(model.device, tokens=8) else torch.float32)

    def twin(self, model: PreTrainedModel) -> TrainedDrafter:
        """The same method with random weights, for a model of any size: its whole vocabulary is drafted."""
        return type(self)(self.network.twin(model.config.get_text_config(decoder=True)), self.name)

    def begin(self, state: State, scores: Scores) -> None:
        """Keeps the prompt's states; they are read when the first draft is asked for."""
        if scores.taps is None or scores.taps.shape[-1] != self.network.config.hidden * len(self.taps):
            raise UserError(
                f"method '{self.name}' needs the target's states at layers {self.taps}, which were not kept"
            )
        state.memory = self.decoded(state, scores.taps)

    def decoded(self, state: State, taps: Tensor) -> DecodedStates:
        """What keeps the target's states, from the prompt's `taps` [B, L, T*H] on."""
        return DecodedStates(taps)

    def propose(self, state: State, budget: Budget, sampler: Sampler) -> DraftTree:
        """See `Drafter`; nothing where answers most likely end and time counts."""
        newest, rows = state.layout.newest(), budget.rows
        if budget.nodes < 1 or not rows or (budget.seconds is not None and self.all_end(state, rows)):
            return DraftTree.root_only(newest)
        return self.draft(state, rows, budget, sampler)

    def draft(self, state: State, rows: list[int], budget: Budget, sampler: Sampler) -> DraftTree:
        """The likeliest nodes of the `subtrees`, in `rows`."""
        newest = state.layout.newest()
        context, anchors = state.memory.read(self.network, state.layout).upto(rows)
        levels, subtrees = self.levels(context, anchors, newest[rows]), self.subtrees(state, rows, budget)
        kinds, warmth = self.modality_ids.to(newest.device), temperature(sampler)
        tree = grow(levels, self.network, subtrees, kinds, newest[rows], budget.of(rows), warmth, self.cost)
        return tree.among(rows, newest)

    def all_end(self, state: State, rows: list[int]) -> bool:
        """Whether the answers of all `rows` most likely end with the token that the target's pass gives anyway."""
        return False

    def levels(self, context: Sequence[Keys], anchors: Anchors, newest: Tensor) -> Levels:
        """The draft distributions below the tokens `newest` [R]."""
        return SharedLevels(self.network.levels(context, anchors, newest))

    def subtrees(self, state: State, rows: list[int], budget: Budget) -> Subtrees:
        """Those of the budget's `rows`: one for each, `config.width` wide."""
        c, newest = self.network.config, state.layout.newest()[rows]
        width = c.width if budget.width is None else min(budget.width, c.width)
        return Subtrees.single(newest, budget.nodes, Shape(width, c.depth))

    def route(self, state: State, tree: DraftTree, scores: Scores) -> Tensor | None:
        """No router."""
        return None

    def observe(self, state: State, tree: DraftTree, scores: Scores, accepted: Accepted) -> None:
        """Keeps the target's states of what was emitted."""
        state.memory.observe(scores, accepted)


class SharedLevels:
    """One network's distributions for all subtrees, which keep their modality all the way down (see `Levels`)."""

    def __init__(self, levels: Levels) -> None:
        self.inner, self.weights, self.at_root = levels, torch.empty(0), True

    def root(self, weights: Tensor) -> Distributions:
        """See `Levels`; the network has one distribution for all F of them."""
        self.weights, F = weights, weights.shape[1]
        found = self.inner.root(weights[:, :1, :1])
        return Distributions(found.logits.expand(-1, F, -1), found.sure.expand(-1, F), weights)

    def below(self, tokens: Tensor, above: Tensor) -> Distributions:
        """See `Levels`."""
        self.weights = pick(self.weights, above)
        found = self.inner.below(tokens, torch.zeros_like(above) if self.at_root else above)
        self.at_root = False
        return Distributions(found.logits, found.sure, self.weights)
