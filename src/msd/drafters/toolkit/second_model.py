"""A second model drafts: its state of a batch, with a cache, positions and a vocabulary of its own.

The model is run by a `Target` of its own, so any architecture that can be a target can draft as well. What it read as
its prompt is up to the method: another image, another text, or none. A map translates the tokens that follow.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from msd.core.layout import Layout
from msd.core.sampling import Sampler
from msd.core.tree import DraftTree
from msd.drafters.toolkit.chained import ChainedLevels, draft
from msd.drafters.toolkit.growth import DraftVocabulary, Shape
from msd.drafters.toolkit.level_cost import LevelCost
from msd.drafters.toolkit.vocabulary import VocabularyMap
from msd.planning.plan import Budget
from msd.targets.base import Target
from msd.targets.state import State

LONGEST = 64  # unread tokens that one pass reads, after steps without drafts


def room(layout: Layout, columns: int, shape: Shape) -> int:
    """Returns the slots that a second model needs behind its prompt, if the target's prompt has `columns` columns.

    Rows differ by less than one step's tokens in what they have read.
    """
    return layout.capacity - columns + (1 + shape.width) * (1 + shape.depth)


@dataclass
class SecondModel:
    """The second model's state of B rows.

    mapping: between its vocabulary and the target's. state: its own; every token before the unread ones is in its
    cache, which does not store rows that it does not draft for. seen: for each row, the number of columns of the
    target's layout that it has read. guess: (tokens [B],
    logits [B, n] after them), its prediction of the first unread token, see `predict`.
    """

    target: Target
    mapping: VocabularyMap
    state: State
    seen: list[int]
    guess: tuple[Tensor, Tensor] | None = field(default=None)

    def predict(self, logits: Tensor) -> None:
        """Reads the most likely first token of each answer, given the logits [B, n] after the prompt.

        If the target emits these tokens, the first step needs no pass for them.
        """
        tokens = self.mapping.ids[logits.argmax(-1)]
        end = list(self.state.layout.end)
        self._append(list(range(len(tokens))), tokens[:, None].tolist())
        self.guess = tokens, self.score(DraftTree.root_only(tokens), 0)[:, 0]
        self.state.layout.end = end

    def propose(
        self, layout: Layout, alive: list[int], shape: Shape, vocabulary: DraftVocabulary, budget: Budget,
        sampler: Sampler, cost: LevelCost,
    ) -> DraftTree:  # fmt: skip
        """Reads the emitted tokens of the rows `alive` of the target's layout, and grows trees within the budget.

        The budget allows drafts, and each of these rows has emitted tokens since the last call.
        """
        newest, (rows, unread) = layout.newest(), self.open(layout, alive)
        if not rows:
            return DraftTree.root_only(newest)
        known = self._known(rows, unread)
        levels = ChainedLevels(self.score, unread, newest.device, known)
        tree = draft(levels, vocabulary, newest[rows], shape, budget.select(rows), partial(sampler.outlook, rows), cost)
        self.close(rows, unread)
        return tree.scatter(rows, newest)

    def open(self, layout: Layout, alive: list[int]) -> tuple[list[int], list[list[int]]]:
        """Begins a step of the rows `alive`; returns (the rows, their unread tokens, at most `LONGEST` in one)."""
        self.state.cache.keep(alive)
        rows = list(self.state.cache.rows)
        unread = [layout.tokens[row, self.seen[row] : layout.end[row]].tolist() for row in rows]
        while unread and min(map(len, unread)) > LONGEST:
            self._read(rows, [tokens[:LONGEST] for tokens in unread])
            unread = [tokens[LONGEST:] for tokens in unread]
        self._append(rows, [tokens[:1] for tokens in unread])
        return rows, unread

    def select(self, rows: list[int]) -> None:
        """Drops all other rows."""
        self.state.select(rows)
        self.seen, self.guess = [self.seen[row] for row in rows], None

    def join(self, other: SecondModel) -> None:
        """Appends the rows of `other`."""
        self.state.join(other.state)
        self.seen, self.guess = self.seen + other.seen, None

    def add_rows(self, before: int = 0, behind: int = 0) -> None:
        """Adds rows that it does not draft for, before and behind all others."""
        layouts = [_empty(self.state.layout, before), self.state.layout, _empty(self.state.layout, behind)]
        whole = layouts[0]
        for layout in layouts[1:]:
            whole.join(layout)
        self.state.layout = whole
        self.state.cache.add_unstored(before, behind)
        self.seen, self.guess = [0] * before + self.seen + [0] * behind, None

    def _known(self, rows: list[int], unread: list[list[int]]) -> Tensor | None:
        """Takes the guess: returns the logits after it if it was right in all rows, none of which was dropped."""
        guess, self.guess = self.guess, None
        right = guess is not None and rows == list(range(len(self.seen))) and unread == guess[0][:, None].tolist()
        return guess[1] if guess is not None and right else None

    def _read(self, rows: list[int], tokens: list[list[int]]) -> None:
        """Reads tokens without drafting."""
        self._append(rows, [row[:1] for row in tokens])
        levels = ChainedLevels(self.score, tokens, self.state.layout.tokens.device)
        self.score(levels.tree, 0)
        self.close(rows, tokens)

    def _append(self, rows: list[int], tokens: list[list[int]]) -> None:
        for row, own in zip(rows, tokens, strict=True):
            self.state.layout.append(row, self.mapping.read(torch.tensor(own, dtype=torch.long)).tolist())

    def close(self, rows: list[int], unread: list[list[int]]) -> None:
        """Keeps the chain, whose first token is in the layout already, and drops the drafts."""
        paths: list[list[int]] = [[] for _ in self.seen]
        for row, tokens in zip(rows, unread, strict=True):
            paths[row] = list(range(len(tokens)))
            self.seen[row] += len(tokens)
        self._append(rows, [tokens[1:] for tokens in unread])
        self.state.cache.commit(paths)

    def score(self, tree: DraftTree, scored: int) -> Tensor:
        """See `Score`: the logits of the shared tokens."""
        cache, rows = self.state.cache, list(self.state.cache.rows)
        cache.reserve(len(rows), max(cache.base) + tree.size)  # rows differ in what they have read
        own = replace(tree, tokens=self.mapping.read(tree.tokens))
        whole = own.scatter(rows, tree.tokens.new_zeros(len(self.seen)))
        if self.target.resumes:
            return self.mapping.shared(self.target.score(self.state, whole, scored).logits[rows])
        return self.mapping.shared(self.target.score(self.state, whole).logits[rows, scored:])


def _empty(like: Layout, rows: int) -> Layout:
    """A layout of `rows` rows with one column each."""
    one = like.tokens.new_zeros(rows, 1)
    return Layout(one, one.clone(), one.new_zeros(len(like.positions), rows, 1), [0] * rows, [1] * rows)
