"""`eventgpt`: an independent model drafts; it sees a recording of an event camera, not the target's images.

A map between the two vocabularies translates the text. The drafter does not use the target's hidden states, so it
reads the prompt, and predicts the answer's first token, while the target prefills. The slot of a text token in the
drafter's cache is its position. Drafted tokens, which may share positions, use the slots behind the text.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from msd.core.cache import KVCache
from msd.core.layout import Layout
from msd.core.modality import LANGUAGE
from msd.core.sampling import Sampler, temperature
from msd.core.tree import DraftTree, Scores
from msd.drafters import registry
from msd.drafters.algorithms.eventgpt.network import METHOD, SOURCE, EventGPT, EventGPTConfig
from msd.drafters.algorithms.eventgpt.vocabulary import FILE, Pieces, VocabularyMap
from msd.drafters.base import Drafter
from msd.drafters.toolkit import checkpoint
from msd.drafters.toolkit.context import pick, real_columns
from msd.drafters.toolkit.growth import Distributions, Shape, Subtrees, grow
from msd.drafters.toolkit.level_cost import LevelCost
from msd.errors import UserError
from msd.planning.plan import Budget
from msd.system.files import write_whole
from msd.targets.masks import additive
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
    shown = real & (layout.modality[:, :columns] != LANGUAGE.id)
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


@dataclass
class Memory:
    """The drafter's state of B rows.

    seen: number of layout columns read, per row. logits: [B, n] of the shared pieces after the last token read.
    guess: [B] target ids, the drafter's prediction of the answer's first token. It is read already (`logits` follow
    it) but not committed; None after the first step.
    """

    network: EventGPT
    mapping: VocabularyMap
    cache: KVCache
    seen: list[int]
    logits: Tensor
    guess: Tensor | None = None

    @classmethod
    def begin(
        cls, network: EventGPT, mapping: VocabularyMap, layout: Layout, columns: int, auxiliary: Tensor | None
    ) -> Memory:
        """Reads a prompt of `columns` columns, predicts the answer's first token, and reads it as well."""
        c = network.config
        entries, length = inputs(network, mapping, layout, columns, auxiliary)
        B, S, _ = entries.shape
        room = S + layout.capacity - columns + c.width * c.depth
        cache = KVCache(c.layers, B, room)
        states = network.states(entries, torch.arange(S, device=entries.device).expand(B, -1), cache)
        cache.committed = list(length)  # the padding behind a shorter row is overwritten
        memory = cls(network, mapping, cache, [columns] * B, logits_after(network, mapping, states, length))
        memory.guess = mapping.ids[memory.logits.argmax(-1)]
        memory.logits = logits_after(network, mapping, memory._states(memory.guess[:, None]), [1] * B)
        return memory

    def read(self, layout: Layout, drafting: list[bool]) -> None:
        """Reads the emitted tokens; `logits` then predict the token after the newest. drafting: rows that may draft.

        A row that may not draft now never will again: its answer has ended, or lacks one token. Its slots are freed.
        """
        added = [end - seen if go else 0 for end, seen, go in zip(layout.end, self.seen, drafting, strict=True)]
        base = [at if go else 0 for at, go in zip(self.cache.committed, drafting, strict=True)]
        self.cache.committed, self.seen = base, list(layout.end)
        guess, self.guess = self.guess, None
        first = all(n == go for n, go in zip(added, drafting, strict=True))
        expected = guess is not None and first and torch.equal(guess[drafting], layout.newest()[drafting])
        if max(added) and not expected:
            column = torch.arange(max(added)) + torch.tensor(layout.end)[:, None] - torch.tensor(added)[:, None]
            column = column.clamp_max(layout.capacity - 1).to(layout.tokens.device)
            self.logits = logits_after(self.network, self.mapping, self._states(layout.tokens.gather(1, column)), added)
        self.cache.committed = [at + n for at, n in zip(base, added, strict=True)]

    def _states(self, tokens: Tensor) -> Tensor:
        """Computes the states [B, W, H] of target tokens [B, W] behind the committed text; does not commit them."""
        base = torch.tensor(self.cache.committed, device=tokens.device)[:, None]
        positions = base + torch.arange(tokens.shape[1], device=tokens.device)
        slot = torch.arange(max(self.cache.committed) + tokens.shape[1], device=tokens.device)
        mask = additive(slot <= positions[..., None], self.network.dtype)
        return self.network.states(self.network.embed(self.mapping.read(tokens)), positions, self.cache, mask)


def logits_after(network: EventGPT, mapping: VocabularyMap, states: Tensor, length: list[int]) -> Tensor:
    """Returns the logits [B, n] of the shared pieces after the first `length[row]` of the states [B, W, H]."""
    last = torch.tensor(length, device=states.device)[:, None] - 1
    return mapping.shared(network.logits(pick(states, last.clamp_min(0))[:, 0]))


class TreeLevels:
    """The distributions of one step (see `msd.drafters.toolkit.growth.Levels`), for one subtree."""

    def __init__(self, memory: Memory) -> None:
        self.memory, self.level = memory, 0
        self.committed = list(memory.cache.committed)
        self.lineage = memory.logits.new_zeros(len(memory.logits), 1, 0, dtype=torch.bool)  # [B, F, m]

    def root(self, weights: Tensor) -> Distributions:
        """See `Levels`; weights [B, 1, 1]."""
        return _distributions(self.memory.logits[:, None])

    def below(self, tokens: Tensor, above: Tensor) -> Distributions:
        """See `Levels`."""
        self.level += 1
        m, (B, F), device = self.memory, tokens.shape, tokens.device
        eye = torch.eye(F, dtype=torch.bool, device=device).expand(B, -1, -1)
        self.lineage = torch.cat([pick(self.lineage, above), eye], -1)
        base = torch.tensor(self.committed, device=device)[:, None]
        drafts = base + torch.arange(self.lineage.shape[-1], device=device)  # their slots [B, m]
        slot = torch.arange(max(self.committed) + self.lineage.shape[-1], device=device)
        seen = (slot < base)[:, None].repeat(1, F, 1).scatter_(2, drafts[:, None].expand(-1, F, -1), self.lineage)
        positions = (base + self.level - 1).expand(-1, F)
        embedded = m.network.embed(m.mapping.read(tokens))
        states = m.network.states(embedded, positions, m.cache, additive(seen, m.network.dtype))
        m.cache.advance(F)
        return _distributions(m.mapping.shared(m.network.logits(states)))


def _distributions(logits: Tensor) -> Distributions:
    one = torch.ones_like(logits[..., 0])
    return Distributions(logits, 0 * one, one[..., None])


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

    def log_acceptance(self, log_q: Tensor, confidence: Tensor) -> Tensor:
        """Estimates the log of the acceptance probability of a candidate by its log draft probability."""
        return log_q

    def encode(self, item: Any) -> Tensor:
        """See `ReadsAuxiliary`: event tokens [E, H] of a recording."""
        return self.network.encode(item)

    def read_prompt(self, layout: Layout, auxiliary: Tensor | None) -> Memory:
        """See `ReadsPrompt`."""
        return Memory.begin(self.network, self.mapping, layout, layout.end[0], auxiliary)

    def begin(self, state: State, scores: Scores) -> None:
        """See `Drafter`. Without `read_prompt`, the memory is a function with which the first `propose` reads it."""
        columns, auxiliary = state.layout.end[0] - 1, state.auxiliary
        begin = partial(Memory.begin, self.network, self.mapping, columns=columns, auxiliary=auxiliary)
        state.memory = state.memory or begin

    def propose(self, state: State, budget: Budget, sampler: Sampler) -> DraftTree:
        """Drafts the most probable nodes of one tree, level by level."""
        newest, c = state.layout.newest(), self.network.config
        if budget.nodes < 1 or max(budget.depth, default=0) < 1:
            return DraftTree.root_only(newest)
        if not isinstance(state.memory, Memory):
            state.memory = state.memory(state.layout)
        memory: Memory = state.memory
        memory.read(state.layout, [depth > 0 for depth in budget.depth])
        width = c.width if budget.width is None else min(budget.width, c.width)
        whole = Subtrees.single(newest, Shape(width, c.depth))
        levels = TreeLevels(memory)
        tree = grow(levels, self, whole, (LANGUAGE.id,), newest, budget, temperature(sampler), self.cost)
        memory.cache.committed = levels.committed  # frees the slots of the drafted tokens
        return tree


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
