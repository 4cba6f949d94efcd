"""`eventgpt`: another model drafts, one that sees the recording of an event camera instead of the target's pictures.

Its text is the target's, through a map of the two vocabularies; its pictures are its own. It asks nothing of the
target's states, so it reads the prompt, and guesses the answer's first token, while the target still prefills.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from msd.drafters.eventgpt.config import METHOD
from msd.drafters.eventgpt.memory import Branches, Memory, Reading
from msd.drafters.eventgpt.network import EventGPT
from msd.drafters.eventgpt.vocabulary import Pieces, VocabularyMap
from msd.drafters.msd.config import Shape
from msd.drafters.msd.grow import Subtrees, grow
from msd.drafters.msd.pace import Pace
from msd.errors import UserError
from msd.events.pieces import Events
from msd.layout import Layout
from msd.modality import LANGUAGE
from msd.plan import Budget
from msd.sampling import Sampler, temperature
from msd.targets.state import State
from msd.tree import Accepted, DraftTree, Scores


class EventGPTDrafter:
    """Drafts with a network of its own; its candidates are deterministic.

    pieces: the network's piece table. words: a map that was made before; without one it is made of the two tables.
    """

    sampled = False
    taps: tuple[int, ...] = ()

    def __init__(
        self, network: EventGPT, pieces: Pieces | None = None, words: VocabularyMap | None = None, name: str = METHOD
    ) -> None:
        self.network, self.pieces, self.name, self.pace = network.eval(), pieces, name, Pace()
        self._given = words
        self._words: VocabularyMap | None = None  # of the target that it is attached to

    def translate(self, tokenizer: Any) -> None:
        """See `Translates`: makes the map, or checks the one given."""
        if self.pieces is None:
            return
        theirs = Pieces.of(tokenizer)
        if self._given is None:
            self._given = VocabularyMap.between(self.pieces, theirs)
        else:
            self._given.check(self.pieces, theirs)

    def attach(self, model: PreTrainedModel, backend: str = "plain") -> None:
        """Takes the target's place and the size of its vocabulary; UserError without a map of the two vocabularies."""
        if self._given is None:
            raise UserError(
                f"method '{self.name}' speaks a vocabulary of its own: load the target with its processor, or give the "
                "drafter a `VocabularyMap`"
            )
        rows = model.get_input_embeddings().weight.shape[0]
        self._words = self._given.sized(self.network.config.vocabulary, rows).to(model.device)
        self.network.to(model.device)

    def twin(self, model: PreTrainedModel) -> EventGPTDrafter:
        """A small one with random weights, whose vocabulary is the model's."""
        text = model.config.get_text_config(decoder=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = EventGPT.for_text(text)
        return EventGPTDrafter(network, None, VocabularyMap.identity(text.vocab_size), self.name)

    @property
    def words(self) -> VocabularyMap:
        """Between the network's vocabulary and that of the target it is attached to."""
        assert self._words is not None, "attach comes first"
        return self._words

    @property
    def ids(self) -> Tensor:
        """[n] int64: the target's ids of what can be drafted."""
        return self.words.ids

    def hit(self, log_q: Tensor, sure: Tensor) -> Tensor:
        """Log of the chance that a candidate is the target's choice: what the law says."""
        return log_q

    def beside(self, recording: Events) -> Tensor:
        """See `msd.drafters.recordings`: event tokens [E, H]."""
        return self.network.encode(recording)

    def ahead(self, layout: Layout, beside: Tensor | None) -> Memory:
        """See `ReadsAhead`."""
        return self._read(layout, layout.end[0], beside)

    def begin(self, state: State, scores: Scores) -> None:
        """Notes the prompt; where it was not read ahead, it is read when the first draft is asked for."""
        begin = partial(self._read, columns=state.layout.end[0] - 1, beside=state.beside)
        state.memory = Reading(begin, state.memory)

    def propose(self, state: State, budget: Budget, sampler: Sampler) -> DraftTree:
        """The likeliest nodes of one tree, grown level by level."""
        newest, c = state.layout.newest(), self.network.config
        if budget.nodes < 1 or max(budget.depth, default=0) < 1:
            return DraftTree.root_only(newest)
        memory: Memory = state.memory.memory(state.layout)
        memory.read(state.layout, [depth > 0 for depth in budget.depth])
        width = c.width if budget.width is None else min(budget.width, c.width)
        whole = Subtrees.single(newest, budget.nodes, Shape(width, c.depth))
        kinds = torch.tensor([LANGUAGE.id], device=newest.device)
        laws = Branches(memory)
        tree = grow(laws, self, whole, kinds, newest, budget, temperature(sampler), self.pace)
        laws.forget()
        return tree

    def route(self, state: State, tree: DraftTree, scores: Scores) -> Tensor | None:
        """No router."""
        return None

    def observe(self, state: State, tree: DraftTree, scores: Scores, accepted: Accepted) -> None:
        """Nothing to note: what was emitted stands in the layout."""

    def _read(self, layout: Layout, columns: int, beside: Tensor | None) -> Memory:
        return Memory.begin(self.network, self.words, layout, columns, beside)
