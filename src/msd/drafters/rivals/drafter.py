"""A rival at work: its tree, grown and pruned as EAGLE-2 does it, within the plan's budget as every method's is."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from msd.backends.precision import faster_in_bf16
from msd.drafters.msd.config import Shape
from msd.drafters.msd.context import pick
from msd.drafters.msd.grow import Subtrees, grow
from msd.drafters.msd.laws import Laws, Levels
from msd.drafters.msd.pace import Pace
from msd.drafters.notes import Notes, Remembers
from msd.drafters.rivals.memory import Memory
from msd.drafters.rivals.network import Rival
from msd.errors import UserError
from msd.layout import Layout
from msd.modality import LANGUAGE
from msd.plan import Budget
from msd.sampling import Sampler, temperature
from msd.targets.state import State
from msd.tree import Accepted, DraftTree, Scores


class RivalDrafter:
    """Drafts with a trained network of a published method; its candidates are deterministic."""

    sampled = False

    def __init__(self, network: Rival, name: str | None = None) -> None:
        self.network, self.name = network.eval(), name or network.method
        self.taps, self.pace = network.config.taps, Pace()

    def attach(self, model: PreTrainedModel, backend: str = "plain") -> None:
        """Takes the target's embedding and head; UserError when the target is not the one it was trained for."""
        vocabulary, hidden = model.get_input_embeddings().weight.shape
        c = self.network.config
        if (vocabulary, hidden) != (c.vocabulary, c.hidden):
            raise UserError(
                f"method '{self.name}' was trained for a target with {c.vocabulary} tokens and hidden size {c.hidden}, "
                f"not {vocabulary} and {hidden}; train one with `msd train --method {self.network.method}`"
            )
        self.network.attach(model).to(model.device)
        if backend != "plain":
            self.network.pack(torch.bfloat16 if faster_in_bf16(model.device, tokens=8) else torch.float32)

    def twin(self, model: PreTrainedModel) -> RivalDrafter:
        """The same method with random weights, for a model of any size: its whole vocabulary is drafted."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = type(self.network).for_target(model.config.get_text_config(decoder=True))
            for p in network.parameters():
                if not p.any():
                    nn.init.normal_(p, std=0.3)
        return RivalDrafter(network, self.name)

    def begin(self, state: State, scores: Scores) -> None:
        """Notes the prompt; it is read when the first draft is asked for."""
        if scores.taps is None or scores.taps.shape[-1] != self.network.config.hidden * len(self.taps):
            raise UserError(
                f"method '{self.name}' needs the target's states at layers {self.taps}, which were not kept"
            )
        state.memory = Notes(scores.taps, self.remember)

    def propose(self, state: State, budget: Budget, sampler: Sampler) -> DraftTree:
        """The likeliest nodes of the `subtrees`."""
        newest = state.layout.newest()
        going = budget.rows
        if budget.nodes < 1 or not going:
            return DraftTree.root_only(newest)
        memory, roots = state.memory.read(self.network, state.layout), newest[going]
        context, anchors = memory.upto(going)
        laws = Alike(self.network.laws(context, anchors, roots))
        subtrees, kinds = self.subtrees(state, roots, budget)
        limits = budget.of(going)
        tree = grow(laws, self.network, subtrees, kinds, roots, limits, temperature(sampler), self.pace)
        return tree.among(going, newest)

    def remember(self, network: Rival, layout: Layout, taps: Tensor) -> Remembers:
        """What reads the notes; see `Memory.begin`."""
        return Memory.begin(network, layout, taps)

    def subtrees(self, state: State, newest: Tensor, budget: Budget) -> tuple[Subtrees, Tensor]:
        """One for each of the `newest` tokens [R] of the budget's rows, `config.width` wide.

        And the registry ids of the modalities that subtrees are told by.
        """
        c = self.network.config
        width = c.width if budget.width is None else min(budget.width, c.width)
        return Subtrees.single(newest, budget.nodes, Shape(width, c.depth)), torch.tensor(
            [LANGUAGE.id], device=newest.device
        )

    def route(self, state: State, tree: DraftTree, scores: Scores) -> Tensor | None:
        """No router."""
        return None

    def observe(self, state: State, tree: DraftTree, scores: Scores, accepted: Accepted) -> None:
        """Notes the target's states of what was emitted."""
        state.memory.observe(scores, accepted)


class Alike:
    """One trunk's laws for all subtrees, which keep their modality all the way down (see `Levels`)."""

    def __init__(self, levels: Levels) -> None:
        self.levels, self.weights, self.at_root = levels, torch.empty(0), True

    def root(self, weights: Tensor) -> Laws:
        """See `Levels`; the trunk has one law for all F of them."""
        self.weights, F = weights, weights.shape[1]
        laws = self.levels.root(weights[:, :1, :1])
        return Laws(laws.logits.expand(-1, F, -1), laws.sure.expand(-1, F), weights)

    def below(self, tokens: Tensor, above: Tensor) -> Laws:
        """See `Levels`."""
        self.weights = pick(self.weights, above)
        laws = self.levels.below(tokens, torch.zeros_like(above) if self.at_root else above)
        self.at_root = False
        return Laws(laws.logits, laws.sure, self.weights)
