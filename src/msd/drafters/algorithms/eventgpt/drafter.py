"""`eventgpt`: another model drafts, one that sees the recording of an event camera instead of the target's pictures.

Its text is the target's, through a map of the two vocabularies; its pictures are its own. It asks nothing of the
target's states, so it reads the prompt, and guesses the answer's first token, while the target still prefills.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from msd.drafters import registry
from msd.drafters.algorithms.eventgpt import vocabulary
from msd.drafters.algorithms.eventgpt.memory import Branches, Memory
from msd.drafters.algorithms.eventgpt.network import METHOD, EventGPT, EventGPTConfig
from msd.drafters.algorithms.eventgpt.vocabulary import Pieces, VocabularyMap
from msd.drafters.toolkit import checkpoint
from msd.drafters.toolkit.growth import LevelCost, Shape, Subtrees, grow
from msd.errors import UserError
from msd.events.pieces import Events
from msd.files import write_whole
from msd.layout import Layout
from msd.modality import LANGUAGE
from msd.plan import Budget
from msd.sampling import Sampler, temperature
from msd.targets.state import State
from msd.tree import Accepted, DraftTree, Scores

PIECES = "pieces.json"


class EventGPTDrafter:
    """Drafts with a network of its own; its candidates are deterministic.

    pieces: the network's piece table. words: a map that was made before; without one it is made of the two tables.
    """

    sampled = False
    taps: tuple[int, ...] = ()

    def __init__(
        self, network: EventGPT, pieces: Pieces | None = None, words: VocabularyMap | None = None, name: str = METHOD
    ) -> None:
        self.network, self.pieces, self.name, self.cost = network.eval(), pieces, name, LevelCost()
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
        """Log of the chance that a candidate is the target's choice: its log probability."""
        return log_q

    def beside(self, recording: Events) -> Tensor:
        """See `msd.drafters.recordings`: event tokens [E, H]."""
        return self.network.encode(recording)

    def ahead(self, layout: Layout, beside: Tensor | None) -> Memory:
        """See `ReadsAhead`."""
        return self._read(layout, layout.end[0], beside)

    def begin(self, state: State, scores: Scores) -> None:
        """Reads the prompt, where that was not done ahead."""
        if state.memory is None:
            state.memory = self._read(state.layout, state.layout.end[0] - 1, state.beside)

    def propose(self, state: State, budget: Budget, sampler: Sampler) -> DraftTree:
        """The likeliest nodes of one tree, grown level by level."""
        newest, c = state.layout.newest(), self.network.config
        if budget.nodes < 1 or max(budget.depth, default=0) < 1:
            return DraftTree.root_only(newest)
        memory: Memory = state.memory
        memory.read(state.layout, [depth > 0 for depth in budget.depth])
        width = c.width if budget.width is None else min(budget.width, c.width)
        whole = Subtrees.single(newest, budget.nodes, Shape(width, c.depth))
        kinds = torch.tensor([LANGUAGE.id], device=newest.device)
        levels = Branches(memory)
        tree = grow(levels, self, whole, kinds, newest, budget, temperature(sampler), self.cost)
        levels.forget()
        return tree

    def route(self, state: State, tree: DraftTree, scores: Scores) -> Tensor | None:
        """No router."""
        return None

    def observe(self, state: State, tree: DraftTree, scores: Scores, accepted: Accepted) -> None:
        """Nothing to note: what was emitted stands in the layout."""

    def _read(self, layout: Layout, columns: int, beside: Tensor | None) -> Memory:
        return Memory.begin(self.network, self.words, layout, columns, beside)


def save(
    network: EventGPT,
    pieces: Pieces,
    folder: Path,
    words: VocabularyMap | None = None,
    training: dict[str, Any] | None = None,
) -> None:
    """Writes the drafter. words: a map that ties it to one target; without one it takes any that shares pieces."""
    checkpoint.save(network, folder, training)
    write_whole(folder / PIECES, pieces.as_json() + "\n")
    if words is not None:
        words.save(folder / vocabulary.FILE)


def load(folder: Path | str, dtype: torch.dtype = torch.float32) -> tuple[EventGPT, Pieces, VocabularyMap | None]:
    """What `EventGPTDrafter` is made of, on the CPU. UserError says what is wrong with the folder."""
    folder = Path(folder)
    network = checkpoint.load(folder, lambda text: EventGPT(EventGPTConfig.from_json(text)), dtype)
    try:
        pieces = Pieces.from_json((folder / PIECES).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, UserError) as error:
        raise UserError(f"drafter '{folder}': its piece table {PIECES} cannot be read ({error})") from error
    saved = folder / vocabulary.FILE
    return network, pieces, VocabularyMap.load(saved) if saved.exists() else None


registry.add(
    registry.Method(
        METHOD, lambda parts: EventGPTDrafter(*parts), (METHOD,), load=load, command="see docs/events.md for a folder"
    )
)
