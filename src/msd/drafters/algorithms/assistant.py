"""`assistant`: an assistant made for the target drafts from the target's own keys and values (Gemma 4's).

An assistant has no cache. Each of its layers attends to the keys and values of the last target layer of the same type.
Its input is the embedding of a token and the target's final state before it, below the root its own last state. All
drafts have the position of the root. They do not attend to each other, so a frontier is one pass of F independent
queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from msd.core.sampling import Sampler
from msd.core.tree import Accepted, DraftTree, Scores
from msd.drafters.base import Drafter
from msd.drafters.toolkit.chained import distributions, draft, drafts
from msd.drafters.toolkit.context import pick
from msd.drafters.toolkit.growth import Distributions, Shape
from msd.drafters.toolkit.level_cost import LevelCost
from msd.drafters.toolkit.observed import ObservedDrafter
from msd.errors import UserError
from msd.planning.plan import Budget
from msd.targets import masks
from msd.targets.registry import fingerprint
from msd.targets.state import State
from msd.targets.taps import FINAL

METHOD = "assistant"
ARCHITECTURES = ("gemma4_assistant", "gemma4_unified_assistant")
TREE = Shape(width=3, depth=6)


@dataclass
class AssistantLevels:
    """The distributions of one step (see `msd.drafters.toolkit.growth.Levels`), for one subtree of R rows.

    newest: [R]. states: [R, F, H], the states that the next pass reads: at first the target's, [R, 1, H]. shared: for
    each layer type, the target's keys and values [R, K, S, D] and the mask [R, 1, 1, S] over them. positions: [R, 1].
    """

    drafter: AssistantDrafter
    newest: Tensor
    states: Tensor
    shared: dict[str, tuple[Tensor, Tensor]]
    visible: dict[str, Tensor]
    positions: Tensor

    def root(self, weights: Tensor) -> Distributions:
        """See `Levels`; weights [R, 1, 1]."""
        return self._pass(self.newest[:, None], self.states)

    def below(self, tokens: Tensor, above: Tensor) -> Distributions:
        """See `Levels`."""
        return self._pass(tokens, pick(self.states, above))

    def _pass(self, tokens: Tensor, states: Tensor) -> Distributions:
        model: Any = self.drafter.model
        inputs = model.pre_projection(torch.cat([self.drafter.embed(tokens), states], -1))
        positions, visible = self.positions.expand_as(tokens), self.visible
        F = tokens.shape[1]
        last = model.model(
            input_ids=None, inputs_embeds=inputs, position_ids=positions, shared_kv_states=self.shared,
            attention_mask={kind: mask.expand(-1, -1, F, -1) for kind, mask in visible.items()}, use_cache=False,
            logits_to_keep=slice(None),  # an int would drop queries
        ).last_hidden_state  # fmt: skip
        self.states = model.post_projection(last)
        ordered = model.masked_embedding
        return distributions(model.lm_head(last) if ordered is None else ordered(last, model.lm_head.weight))


class AssistantDrafter(ObservedDrafter):
    """Drafts with an assistant of the target; its candidates are deterministic. label: its name in messages."""

    name, taps, joinable = METHOD, (FINAL,), True

    def __init__(self, model: PreTrainedModel, label: str = METHOD) -> None:
        self.model, self.label, self.cost = model.eval(), label, LevelCost()

    def attach(self, model: PreTrainedModel, backend: str = "plain") -> None:
        """Finds the target's layers whose keys are shared; UserError for another target than its own."""
        text = model.config.get_text_config(decoder=True)
        own = self.model.config.get_text_config(decoder=True)
        kinds = list(getattr(text, "layer_types", None) or ())
        kept = kinds[: len(kinds) - (getattr(text, "num_kv_shared_layers", None) or 0)]
        fits = text.hidden_size == self.model.config.backbone_hidden_size and text.vocab_size == own.vocab_size
        if not fits or not set(own.layer_types) <= set(kept):
            raise UserError(
                f"assistant '{self.label}' is not made for target '{model.config.name_or_path}' ({text.model_type}); "
                "choose the one that was published with it"
            )
        self.layers = {kind: max(i for i, other in enumerate(kept) if other == kind) for kind in set(own.layer_types)}
        self.windows, self.embed = masks.attention_windows(text), model.get_input_embeddings()
        self.model.to(model.device)
        self._ids = torch.arange(own.vocab_size, device=model.device)

    def twin(self, model: PreTrainedModel) -> Drafter:
        """See `Drafter`; UserError, because another model has no such assistant, and the method does not sample."""
        raise UserError(f"method '{self.name}' has no twin: an assistant belongs to one target")

    def fingerprint(self) -> str:
        """See `ObservedDrafter`."""
        return fingerprint(self.model)

    @property
    def ids(self) -> Tensor:
        """[V] int64: all tokens of the target."""
        return self._ids

    def begin(self, state: State, scores: Scores) -> None:
        """Stores the target's state [1, H] before the newest token of each row."""
        self.cost.begin()
        assert scores.taps is not None
        state.memory = list(scores.taps[:, -1:])

    def observe(self, state: State, tree: DraftTree, scores: Scores, accepted: Accepted) -> None:
        """Stores the state before the newest token: that of the node above it."""
        super().observe(state, tree, scores, accepted)
        assert scores.taps is not None
        for row, (nodes, tokens) in enumerate(zip(accepted.nodes, accepted.tokens, strict=True)):
            if tokens:
                node = [0, *nodes][len(tokens) - 1]
                state.memory[row] = scores.taps[row, node : node + 1]

    def select(self, state: State, rows: list[int]) -> None:
        """See `Drafter`."""
        state.memory = [state.memory[row] for row in rows]

    def join(self, state: State, other: State) -> None:
        """See `Drafter`."""
        state.memory += other.memory

    def propose(self, state: State, budget: Budget, sampler: Sampler) -> DraftTree:
        """Drafts the most probable nodes of one tree, level by level."""
        layout, newest = state.layout, state.layout.newest()
        if not drafts(budget):
            return DraftTree.root_only(newest)
        rows, slots = list(state.cache.rows), max(state.cache.base)
        base = torch.tensor(state.cache.base, device=newest.device)[:, None, None]
        first = torch.tensor([layout.start[row] for row in rows], device=newest.device)[:, None, None]
        slot = torch.arange(slots, device=newest.device)
        tables = (slot >= first) & (slot < base), base - slot, (base - first)[:, :, 0]
        found = masks.masks(tables, self.windows, self.model.dtype)
        shared = {kind: state.cache.read(layer, slots) for kind, layer in self.layers.items()}
        positions = layout.next_positions(torch.zeros_like(newest[rows])[:, None], rows)[0]
        visible = {kind: found if isinstance(found, Tensor) else found[kind] for kind in self.layers}
        levels = AssistantLevels(
            self, newest[rows], torch.stack([state.memory[row] for row in rows]), shared, visible, positions
        )
        outlook = partial(sampler.outlook, rows)
        return draft(levels, self, newest[rows], TREE, budget.select(rows), outlook, self.cost).scatter(rows, newest)
