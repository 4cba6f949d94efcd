"""`eventgpt`: another model drafts, one that sees the recording of an event camera instead of the target's pictures.

Its text is the target's, through a map of the two vocabularies; its pictures are its own. It asks nothing of the
target's states, so it reads the prompt, and guesses the answer's first token, while the target still prefills.

The drafter's text of a row is a run of cache slots from 0 on, so a word's slot is also its position; only drafts,
several of which may stand at one position, are written wherever there is room behind it.
"""

from __future__ import annotations

from collections.abc import Callable
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
from msd.core.tree import Accepted, DraftTree, Scores
from msd.drafters import registry
from msd.drafters.algorithms.eventgpt import vocabulary
from msd.drafters.algorithms.eventgpt.network import METHOD, EventGPT, EventGPTConfig
from msd.drafters.algorithms.eventgpt.vocabulary import Pieces, VocabularyMap
from msd.drafters.toolkit import checkpoint
from msd.drafters.toolkit.context import pick
from msd.drafters.toolkit.growth import Distributions, LevelCost, Shape, Subtrees, grow
from msd.errors import UserError
from msd.events.recording import Events
from msd.planning.plan import Budget
from msd.system.files import write_whole
from msd.targets.masks import additive
from msd.targets.state import State

PIECES = "pieces.json"
NOWHERE = torch.iinfo(torch.long).max


def inputs(
    network: EventGPT, words: VocabularyMap, layout: Layout, columns: int, beside: Tensor | None
) -> tuple[Tensor, list[int]]:
    """(inputs [B, S, H] of the first `columns` of a layout, left-aligned; how many are real in each row).

    Columns of pictures are left out. A row's event tokens (`beside` [B, E, H], all zero in rows without any) stand
    where its first picture stood, or after the first token of a row without one. UserError for another number of them.
    """
    E, H = network.config.tokens, network.config.hidden
    column = torch.arange(columns, device=layout.tokens.device)
    start = torch.tensor(layout.start, device=column.device)
    real = column >= start[:, None]
    shown = real & (layout.modality[:, :columns] != LANGUAGE.id)
    kept, place = real & ~shown, (2 * column).expand_as(real)
    entries = network.embed(words.read(layout.tokens[:, :columns]))
    if beside is not None:
        if beside.shape[1:] != (E, H):
            raise UserError(
                f"the drafter takes {E} event tokens of {H} numbers a recording, not {list(beside.shape[1:])}; make "
                "them with its `beside`"
            )
        first = torch.where(shown.any(1), shown.long().argmax(1), start + 1)[:, None]
        given = beside.flatten(1).any(1, keepdim=True)
        kept = torch.cat([given.expand(-1, E), kept], 1)
        place = torch.cat([(2 * first - 1).expand(-1, E), place], 1)  # between two columns
        entries = torch.cat([beside.to(entries), entries], 1)
    count = kept.sum(1).clamp_min(1)
    order = place.masked_fill(~kept, NOWHERE).argsort(dim=1, stable=True)[:, : int(count.max())]
    return pick(entries, order), count.tolist()


@dataclass
class Memory:
    """B rows. cache: the drafter's own. seen: columns of the layout that were read, per row.

    logits: [B, n] of the shared pieces after the last word read. guess: [B] target ids: the first token of the
    answer as the drafter expects it, already read (`logits` are what follows it) but not committed; None later on.
    """

    network: EventGPT
    words: VocabularyMap
    cache: KVCache
    seen: list[int]
    logits: Tensor
    guess: Tensor | None = None

    @classmethod
    def begin(
        cls, network: EventGPT, words: VocabularyMap, layout: Layout, columns: int, beside: Tensor | None
    ) -> Memory:
        """Reads a prompt of `columns` columns, guesses the answer's first token, and reads that too."""
        c = network.config
        entries, length = inputs(network, words, layout, columns, beside)
        B, S, _ = entries.shape
        room = S + layout.capacity - columns + c.width * c.depth
        cache = KVCache(c.layers, B, room)
        states = network.states(entries, torch.arange(S, device=entries.device).expand(B, -1), cache)
        cache.committed = list(length)  # what stands behind a shorter row's last word is written over
        made = cls(network, words, cache, [columns] * B, logits_after(network, words, states, length))
        made.guess = words.ids[made.logits.argmax(-1)]
        made.logits = logits_after(network, words, made._states(made.guess[:, None]), [1] * B)
        return made

    def read(self, layout: Layout, going: list[bool]) -> Tensor:
        """`logits` below the newest token, once all that was emitted has been read. going: rows that may draft.

        A row that may not, now, never will again (its answer has ended or is one token short of that): its text is
        given up, so that it needs no room.
        """
        added = [end - seen if go else 0 for end, seen, go in zip(layout.end, self.seen, going, strict=True)]
        base = [at if go else 0 for at, go in zip(self.cache.committed, going, strict=True)]
        self.cache.committed, self.seen = base, list(layout.end)
        guess, self.guess = self.guess, None
        first = all(n == go for n, go in zip(added, going, strict=True))
        expected = guess is not None and first and torch.equal(guess[going], layout.newest()[going])
        if max(added) and not expected:
            column = torch.arange(max(added)) + torch.tensor(layout.end)[:, None] - torch.tensor(added)[:, None]
            column = column.clamp_max(layout.capacity - 1).to(layout.tokens.device)
            self.logits = logits_after(self.network, self.words, self._states(layout.tokens.gather(1, column)), added)
        self.cache.committed = [at + n for at, n in zip(base, added, strict=True)]
        return self.logits

    def _states(self, tokens: Tensor) -> Tensor:
        """States [B, W, H] of target tokens [B, W] that follow what is committed, which they are not by this."""
        base = torch.tensor(self.cache.committed, device=tokens.device)[:, None]
        positions = base + torch.arange(tokens.shape[1], device=tokens.device)
        slot = torch.arange(max(self.cache.committed) + tokens.shape[1], device=tokens.device)
        mask = additive(slot <= positions[..., None], self.network.dtype)
        return self.network.states(self.network.embed(self.words.read(tokens)), positions, self.cache, mask)


class Reading:
    """The drafter's memory of a prompt: made ahead, or else when the first draft is asked for."""

    def __init__(self, begin: Callable[[Layout], Memory], made: Memory | None = None) -> None:
        """begin: reads the prompt in a layout that may hold more by now. made: what was read ahead."""
        self._begin, self._made = begin, made

    def memory(self, layout: Layout) -> Memory:
        """What was made of the prompt."""
        if self._made is None:
            self._made = self._begin(layout)
        return self._made


def logits_after(network: EventGPT, words: VocabularyMap, states: Tensor, length: list[int]) -> Tensor:
    """[B, n] logits of the shared pieces after the first `length[row]` of the states [B, W, H]."""
    last = torch.tensor(length, device=states.device)[:, None] - 1
    return words.shared(network.logits(pick(states, last.clamp_min(0))[:, 0]))


class Branches:
    """The distributions of one step (see `msd.drafters.toolkit.growth.Levels`), for one subtree."""

    def __init__(self, memory: Memory) -> None:
        self.memory, self.level = memory, 0
        self.committed = list(memory.cache.committed)
        self.lineage = memory.logits.new_zeros(len(memory.logits), 1, 0, dtype=torch.bool)  # [B, F, m]

    def root(self, weights: Tensor) -> Distributions:
        """See `Levels`; weights [B, 1, 1]."""
        return _found(self.memory.logits[:, None])

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
        words = m.network.embed(m.words.read(tokens))
        states = m.network.states(words, positions, m.cache, additive(seen, m.network.dtype))
        m.cache.advance(F)
        return _found(m.words.shared(m.network.logits(states)))

    def forget(self) -> None:
        """Gives back the slots of the drafts."""
        self.memory.cache.committed = self.committed


def _found(logits: Tensor) -> Distributions:
    one = torch.ones_like(logits[..., 0])
    return Distributions(logits, 0 * one, one[..., None])


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

    def log_acceptance(self, log_q: Tensor, confidence: Tensor) -> Tensor:
        """Log of the chance that a candidate is the target's choice: its log probability."""
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
