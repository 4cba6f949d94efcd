"""`eventgpt`: an independent model drafts; it sees a recording of an event camera, not the target's images.

A map between the two vocabularies translates the text. The drafter does not use the target's hidden states, so it
reads the prompt, and predicts the answer's first token, while the target prefills. The slot of a text token in the
drafter's cache is its position. From there on it drafts as any second model (`toolkit/second_model.py`).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from msd.core.cache import KVCache
from msd.core.layout import Layout
from msd.core.sampling import Sampler
from msd.core.tree import DraftTree, Scores
from msd.drafters import registry
from msd.drafters.algorithms.eventgpt.network import METHOD, SOURCE, EventGPT, EventGPTConfig
from msd.drafters.base import Drafter
from msd.drafters.toolkit import checkpoint
from msd.drafters.toolkit.chained import drafts
from msd.drafters.toolkit.chance import NodeFeatures, corrected
from msd.drafters.toolkit.context import pick, real_columns, visual_columns
from msd.drafters.toolkit.growth import Shape
from msd.drafters.toolkit.level_cost import LevelCost
from msd.drafters.toolkit.second_model import SecondModel, room
from msd.drafters.toolkit.vocabulary import FILE, Pieces, VocabularyMap
from msd.errors import UserError
from msd.planning.plan import Budget
from msd.system.files import write_whole
from msd.targets.base import Target
from msd.targets.state import State

__all__ = ["METHOD", "EventGPT", "EventGPTConfig", "EventGPTDrafter", "Pieces", "VocabularyMap", "load", "save"]

PIECES = "pieces.json"
LAST = torch.iinfo(torch.long).max  # sorts behind every column


def inputs(
    network: EventGPT, mapping: VocabularyMap, layout: Layout, columns: int, auxiliary: Tensor | None
) -> tuple[Tensor, list[int]]:
    """Builds the drafter's inputs [B, S, H], left-aligned, from the first `columns` of a layout; and each row's length.

    Image columns are dropped. A row's event tokens (`auxiliary` [B, E, H], all zero in rows without any) replace its
    first image, or follow the first token in a row without images. UserError for another number or size of tokens.
    """
    E, H = network.config.tokens, network.config.hidden
    column = torch.arange(columns, device=layout.tokens.device)
    real = real_columns(layout, columns)
    shown = visual_columns(layout, columns)
    kept, place = real & ~shown, (2 * column).expand_as(real)
    entries = network.embed(mapping.read(layout.tokens[:, :columns]))
    if auxiliary is not None:
        if auxiliary.shape[1:] != (E, H):
            raise UserError(
                f"the drafter reads {E} event tokens of {H} numbers per recording, not {list(auxiliary.shape[1:])}; "
                "compute them with its `encode`"
            )
        first = torch.where(shown.any(1), shown.long().argmax(1), real.long().argmax(1) + 1)[:, None]
        given = auxiliary.flatten(1).any(1, keepdim=True)
        kept = torch.cat([given.expand(-1, E), kept], 1)
        place = torch.cat([(2 * first - 1).expand(-1, E), place], 1)  # between two columns
        entries = torch.cat([auxiliary.to(entries), entries], 1)
    count = kept.sum(1).clamp_min(1)
    order = place.masked_fill(~kept, LAST).argsort(dim=1, stable=True)[:, : int(count.max())]
    return pick(entries, order), count.tolist()


def begin(
    network: EventGPT, mapping: VocabularyMap, layout: Layout, columns: int, auxiliary: Tensor | None
) -> SecondModel:
    """Reads a prompt of `columns` columns, predicts the answer's first token, and reads it as well."""
    c = network.config
    entries, length = inputs(network, mapping, layout, columns, auxiliary)
    B, S, _ = entries.shape
    capacity = S + room(layout, columns, Shape(c.width, c.depth))
    cache = KVCache(c.layers, B, capacity)
    states = network.states(entries, torch.arange(S, device=entries.device).expand(B, -1), cache)
    cache.committed = list(length)  # the padding behind a shorter row is overwritten
    own = Layout.from_prompt(torch.zeros(B, S, dtype=torch.long, device=entries.device), capacity)
    own.end = list(length)
    target = Target(network.llama, backend="plain", pictures=())
    memory = SecondModel(target, mapping, State(own, cache), [columns] * B)
    last = torch.tensor(length, device=states.device)[:, None] - 1
    memory.predict(mapping.shared(network.logits(pick(states, last)[:, 0])))
    return memory


class EventGPTDrafter(Drafter):
    """Drafts with an independent network; its candidates are deterministic.

    pieces: the network's piece table. mapping: a saved map; without one, `translate` builds it from the two tables.
    """

    auxiliary_source = SOURCE

    def __init__(
        self, network: EventGPT, pieces: Pieces | None = None, mapping: VocabularyMap | None = None, name: str = METHOD
    ) -> None:
        self.network, self.pieces, self.name, self.cost = network.eval(), pieces, name, LevelCost()
        self._saved = mapping
        self._mapping: VocabularyMap | None = None  # sized for the attached target

    def translate(self, tokenizer: Any) -> None:
        """See `Drafter`: builds the map, or checks the saved one."""
        if self.pieces is None:
            return
        theirs = Pieces.of(tokenizer)
        if self._saved is None:
            self._saved = VocabularyMap.between(self.pieces, theirs)
        else:
            self._saved.check(self.pieces, theirs)

    def attach(self, model: PreTrainedModel, backend: str = "plain") -> None:
        """Moves to the target's device and sizes the map for its vocabulary; UserError without a map."""
        if self._saved is None:
            raise UserError(
                f"method '{self.name}' has a vocabulary of its own: load the target with its processor, or give the "
                "drafter a `VocabularyMap`"
            )
        rows = model.get_input_embeddings().weight.shape[0]
        self._mapping = self._saved.sized(self.network.config.vocabulary, rows).to(model.device)
        self.network.to(model.device)

    def twin(self, model: PreTrainedModel) -> EventGPTDrafter:
        """Returns a small drafter with random weights and the model's vocabulary."""
        text = model.config.get_text_config(decoder=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = EventGPT.for_text(text)
        return EventGPTDrafter(network, None, VocabularyMap.identity(text.vocab_size), self.name)

    @property
    def mapping(self) -> VocabularyMap:
        """The map between the network's vocabulary and the attached target's."""
        assert self._mapping is not None, "call attach first"
        return self._mapping

    @property
    def ids(self) -> Tensor:
        """[n] int64: the target's ids of the tokens that can be drafted."""
        return self.mapping.ids

    def log_acceptance(self, node: NodeFeatures) -> Tensor:
        """Estimates the log of the acceptance probability of a candidate by its log draft probability."""
        return corrected(node.log_q, node.correction)

    def encode(self, item: Any) -> Tensor:
        """See `ReadsAuxiliary`: event tokens [E, H] of a recording."""
        return self.network.encode(item)

    def read_prompt(self, layout: Layout, auxiliary: Tensor | None) -> SecondModel:
        """See `ReadsPrompt`."""
        return begin(self.network, self.mapping, layout, layout.end[0], auxiliary)

    def begin(self, state: State, scores: Scores) -> None:
        """See `Drafter`. Without `read_prompt`, the memory is a function with which the first `propose` reads it."""
        self.cost.begin()
        columns, auxiliary = state.layout.end[0] - 1, state.auxiliary
        state.memory = state.memory or partial(begin, self.network, self.mapping, columns=columns, auxiliary=auxiliary)

    def propose(self, state: State, budget: Budget, sampler: Sampler) -> DraftTree:
        """Drafts the most probable nodes of one tree, level by level."""
        if not drafts(budget):
            return DraftTree.root_only(state.layout.newest())
        if not isinstance(state.memory, SecondModel):
            state.memory = state.memory(state.layout)
        c, memory = self.network.config, state.memory
        shape, alive = Shape(c.width, c.depth), state.cache.rows
        return memory.propose(state.layout, alive, shape, self, budget, sampler, self.cost)


def save(
    network: EventGPT,
    pieces: Pieces,
    folder: Path,
    mapping: VocabularyMap | None = None,
    training: dict[str, Any] | None = None,
) -> None:
    """Saves the drafter. mapping: binds it to one target; without one it fits any target that shares pieces with it."""
    checkpoint.save(network, folder, training)
    write_whole(folder / PIECES, pieces.as_json() + "\n")
    if mapping is not None:
        mapping.save(folder / FILE)


def load(folder: Path | str, dtype: torch.dtype = torch.float32) -> tuple[EventGPT, Pieces, VocabularyMap | None]:
    """Loads the arguments of `EventGPTDrafter`, on the CPU. UserError if the folder is damaged."""
    folder = Path(folder)
    network = checkpoint.load(folder, lambda text: EventGPT(EventGPTConfig.from_json(text)), dtype)
    try:
        pieces = Pieces.from_json((folder / PIECES).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, UserError) as error:
        raise UserError(f"drafter '{folder}': its piece table {PIECES} cannot be read ({error})") from error
    saved = folder / FILE
    return network, pieces, VocabularyMap.load(saved) if saved.exists() else None


registry.add(
    registry.Method(
        METHOD, lambda parts: EventGPTDrafter(*parts), (METHOD,), load=load, command="see docs/events.md for a folder"
    )
)
