"""`msd`: modality-aware draft trees (docs/drafter.md)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from msd.backends.precision import faster_in_bf16
from msd.drafters.msd.config import SWITCHES, MSDConfig
from msd.drafters.msd.grow import choose, grow
from msd.drafters.msd.laws import levels
from msd.drafters.msd.memory import Memory
from msd.drafters.msd.network import MSDNetwork
from msd.drafters.msd.pace import Pace
from msd.drafters.msd.sample import draw
from msd.drafters.notes import Notes
from msd.errors import UserError
from msd.events.pieces import Events
from msd.plan import Budget
from msd.sampling import Sampler, temperature
from msd.targets.state import State
from msd.tree import Accepted, DraftTree, Scores


class MSD:
    """Drafts with a trained network.

    sampled: candidates are drawn from the draft laws instead of being the best. calibrated: str(ε) -> modality name ->
    θ that the `budget` policy begins with.
    """

    def __init__(
        self,
        network: MSDNetwork,
        name: str = "msd",
        sampled: bool = False,
        calibrated: dict[str, dict[str, float]] | None = None,
    ) -> None:
        self.network, self.name, self.sampled = network.eval(), name, sampled
        self.calibrated, self.pace = calibrated or {}, Pace()
        self.taps = network.config.taps
        self.modality_ids = torch.tensor(network.config.modality_ids)
        self.beside: Callable[[Events], Tensor] | None = None  # see `msd.drafters.recordings`

    def borrow(self, look: Callable[[Events], Tensor]) -> None:
        """See `BorrowsEye`; of no use to a network that was trained without events."""
        if self.network.beside is not None:
            self.beside = look

    def attach(self, model: PreTrainedModel, backend: str = "plain") -> None:
        """Takes the target's embedding and device; UserError when the target is not the one it was trained for."""
        self.fitted(model)
        if backend != "plain":
            self.network.pack(torch.bfloat16 if faster_in_bf16(model.device, tokens=8) else torch.float32)

    def fitted(self, model: PreTrainedModel) -> MSDNetwork:
        """The network with the target's embedding, on its device; UserError when the two differ in size."""
        embedding = model.get_input_embeddings()
        vocabulary, hidden = embedding.weight.shape
        c = self.network.config
        if (vocabulary, hidden) != (c.vocabulary, c.hidden):
            raise UserError(
                f"method '{self.name}' was trained for a target with {c.vocabulary} tokens and hidden size {c.hidden}, "
                f"not {vocabulary} and {hidden}; train one with `msd train`"
            )
        return self.network.attach(embedding).to(model.device)

    def twin(self, model: PreTrainedModel) -> MSD:
        """The same form and switches with random weights, for a model of any size: its whole vocabulary is drafted."""
        text, c = model.config.get_text_config(decoder=True), self.network.config
        kept = ("form", "modalities", "shapes", "shared", "active_from", *SWITCHES)
        config = MSDConfig.for_target(
            text, text.vocab_size, rank=4, parent_rank=4, image_tokens=2, **{name: getattr(c, name) for name in kept}
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = MSDNetwork(config)
            for p in network.parameters():
                if not p.any():
                    torch.nn.init.normal_(p, std=0.3)
        network.heads.ids = torch.arange(text.vocab_size)
        return MSD(network, self.name, self.sampled)

    def thresholds(self, epsilon: float) -> dict[str, float]:
        """Calibrated θ for the largest known budget within ε; empty when there is none."""
        within = [known for known in self.calibrated if float(known) <= epsilon]
        return self.calibrated[max(within, key=float)] if within else {}

    def begin(self, state: State, scores: Scores) -> None:
        """Notes the prompt; it is read, text and images apart, when the first draft is asked for."""
        if scores.taps is None or scores.taps.shape[-1] != self.network.fuse.in_features:
            raise UserError(
                f"method '{self.name}' needs the target's states at layers {self.taps}, which were not kept"
            )
        state.memory = Notes(scores.taps, partial(Memory.begin, beside=state.beside))

    def propose(self, state: State, budget: Budget, sampler: Sampler) -> DraftTree:
        """Subtrees of the active modalities, merged; or draws from their laws."""
        newest = state.layout.newest()
        going = budget.rows
        if budget.nodes < 1 or not going:
            return DraftTree.root_only(newest)
        if budget.seconds is not None and self.network.all_end(state.memory.newest()[going], newest[going]):
            return DraftTree.root_only(newest)
        notes: Notes[Memory] = state.memory
        memory = notes.read(self.network, state.layout)
        config, heads, kinds = self.network.config, self.network.heads, self.modality_ids.to(newest.device)
        if self.sampled and sampler.do_sample:
            laws = levels(self.network, *memory.upto(None))
            subtrees = choose(config, memory.route, budget.nodes, budget.width)
            return draw(laws, heads, subtrees, kinds, newest, budget, sampler, config.within(config.shared))
        laws = levels(self.network, *memory.upto(going))
        subtrees = choose(config, memory.route[going], budget.nodes, budget.width)
        tree = grow(laws, heads, subtrees, kinds, newest[going], budget.of(going), temperature(sampler), self.pace)
        return tree.among(going, newest)

    def route(self, state: State, tree: DraftTree, scores: Scores) -> Tensor | None:
        """[B, N] class of the token below each node, from the target's states before it (the root's from the notes).

        The prompt is not read for it: an answer that is over before anything is drafted costs no reading.
        """
        if self.network.router is None or scores.taps is None:
            return None
        notes: Notes[Memory] = state.memory
        return self.network.classes(tree, scores.taps, self.network.feature(notes.newest()[:, None]))

    def observe(self, state: State, tree: DraftTree, scores: Scores, accepted: Accepted) -> None:
        """Notes the target's states of what was emitted."""
        state.memory.observe(scores, accepted)
