"""What the drafter remembers of a batch in flight: its own reading of prompt and answer, and the laws it drafts by.

The drafter's text of a row is a run of cache slots from 0 on, so a word's slot is also its position; only drafts,
several of which may stand at one position, are written wherever there is room behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from msd.cache import KVCache
from msd.drafters.eventgpt.network import EventGPT
from msd.drafters.eventgpt.prompt import inputs
from msd.drafters.eventgpt.vocabulary import VocabularyMap
from msd.drafters.msd.context import pick
from msd.drafters.msd.laws import Laws
from msd.layout import Layout
from msd.targets.masks import additive


@dataclass
class Memory:
    """B rows. cache: the drafter's own. seen: columns of the layout that were read, per row.

    law: [B, n] logits of the shared pieces after the last word read. guess: [B] target ids: the first token of the
    answer as the drafter expects it, already read (`law` is what follows it) but not committed; None later on.
    """

    network: EventGPT
    words: VocabularyMap
    cache: KVCache
    seen: list[int]
    law: Tensor
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
        made = cls(network, words, cache, [columns] * B, law_after(network, words, states, length))
        made.guess = words.ids[made.law.argmax(-1)]
        made.law = law_after(network, words, made._states(made.guess[:, None]), [1] * B)
        return made

    def read(self, layout: Layout, going: list[bool]) -> Tensor:
        """`law` below the newest token, once all that was emitted has been read. going: rows that may draft.

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
            self.law = law_after(self.network, self.words, self._states(layout.tokens.gather(1, column)), added)
        self.cache.committed = [at + n for at, n in zip(base, added, strict=True)]
        return self.law

    def _states(self, tokens: Tensor) -> Tensor:
        """States [B, W, H] of target tokens [B, W] that follow what is committed, which they are not by this."""
        base = torch.tensor(self.cache.committed, device=tokens.device)[:, None]
        positions = base + torch.arange(tokens.shape[1], device=tokens.device)
        slot = torch.arange(max(self.cache.committed) + tokens.shape[1], device=tokens.device)
        mask = additive(slot <= positions[..., None], self.network.dtype)
        return self.network.states(self.network.embed(self.words.read(tokens)), positions, self.cache, mask)


class Reading:
    """Of a prompt: done ahead, or else when the first draft is asked for."""

    def __init__(self, begin: Callable[[Layout], Memory], made: Memory | None = None) -> None:
        """begin: reads the prompt in a layout that may hold more by now. made: what was read ahead."""
        self._begin, self._made = begin, made

    def memory(self, layout: Layout) -> Memory:
        """What was made of the prompt."""
        if self._made is None:
            self._made = self._begin(layout)
        return self._made


def law_after(network: EventGPT, words: VocabularyMap, states: Tensor, length: list[int]) -> Tensor:
    """[B, n] logits of the shared pieces after the first `length[row]` of the states [B, W, H]."""
    last = torch.tensor(length, device=states.device)[:, None] - 1
    return words.shared(network.logits(pick(states, last.clamp_min(0))[:, 0]))


class Branches:
    """The laws of one step (see `msd.drafters.msd.laws.Levels`), for one subtree."""

    def __init__(self, memory: Memory) -> None:
        self.memory, self.level = memory, 0
        self.committed = list(memory.cache.committed)
        self.lineage = memory.law.new_zeros(len(memory.law), 1, 0, dtype=torch.bool)  # [B, F, m]

    def root(self, weights: Tensor) -> Laws:
        """See `Levels`; weights [B, 1, 1]."""
        return _laws(self.memory.law[:, None])

    def below(self, tokens: Tensor, above: Tensor) -> Laws:
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
        return _laws(m.words.shared(m.network.logits(states)))

    def forget(self) -> None:
        """Gives back the slots of the drafts."""
        self.memory.cache.committed = self.committed


def _laws(logits: Tensor) -> Laws:
    one = torch.ones_like(logits[..., 0])
    return Laws(logits, 0 * one, one[..., None])
