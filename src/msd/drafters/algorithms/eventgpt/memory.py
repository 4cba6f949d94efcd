"""What the drafter remembers of a batch in flight: its own reading of prompt and answer, and what it drafts from.

Its prompt has the target's words in its own vocabulary, and event tokens where pictures stood.

The drafter's text of a row is a run of cache slots from 0 on, so a word's slot is also its position; only drafts,
several of which may stand at one position, are written wherever there is room behind it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from msd.cache import KVCache
from msd.drafters.algorithms.eventgpt.network import EventGPT
from msd.drafters.algorithms.eventgpt.vocabulary import VocabularyMap
from msd.drafters.toolkit.context import pick
from msd.drafters.toolkit.growth import Distributions
from msd.errors import UserError
from msd.layout import Layout
from msd.modality import LANGUAGE
from msd.targets.masks import additive

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
