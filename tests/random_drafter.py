"""A drafter that means harm: random trees of random tokens, now and then the right continuation."""

from __future__ import annotations

import random
from collections.abc import Sequence

from msd.core.sampling import Sampler
from msd.core.tree import Accepted, DraftTree, Scores
from msd.drafters import Drafter
from msd.planning.plan import Budget
from msd.targets import State


class RandomDrafter(Drafter):
    """Seeded. answers: per row, what the target will say, if known; a draft below a right path is right half the time.

    Draws tree sizes, shapes and tokens (EOS, padding and image placeholders too) anew in every step.
    """

    name = "random"
    taps: tuple[int, ...] = ()
    sampled = False

    def __init__(self, seed: int, vocabulary: int, answers: Sequence[Sequence[int]] = ()) -> None:
        self.random, self.vocabulary, self.answers = random.Random(seed), vocabulary, answers
        self.prompt = 0
        self.shapes: set[tuple[int, ...]] = set()

    def attach(self, model: object, backend: str = "plain") -> None:
        """Any target will do."""

    def twin(self, model: object) -> RandomDrafter:
        """Itself."""
        return self

    def begin(self, state: State, scores: Scores) -> None:
        """Remembers where the prompt ends: one token before the newest."""
        self.prompt = state.layout.end[0] - 1

    def propose(self, state: State, budget: Budget, sampler: Sampler) -> DraftTree:
        rows = [self._row(row, state.layout.end[row] - self.prompt, budget) for row in range(state.layout.batch)]
        self.shapes |= {tuple(parents) for _, parents in rows}
        return DraftTree.from_lists(state.layout.newest(), [t for t, _ in rows], [p for _, p in rows])

    def _row(self, row: int, emitted: int, budget: Budget) -> tuple[list[int], list[int]]:
        """(tokens, parents) of one row; siblings differ."""
        tokens: list[int] = []
        parents: list[int] = []
        depth, right = [0], [True]
        known = self.answers[row] if row < len(self.answers) else ()
        for _ in range(self.random.randint(0, budget.nodes)):
            parent = self.random.choice([0, len(tokens), self.random.randint(0, len(tokens))])
            if depth[parent] >= budget.depth[row]:
                continue
            at = emitted + depth[parent]
            truth = known[at] if right[parent] and at < len(known) else None
            token = truth if truth is not None and self.random.random() < 0.5 else None
            token = self.random.randrange(self.vocabulary) if token is None else token
            if any(p == parent and t == token for p, t in zip(parents, tokens, strict=True)):
                continue
            tokens.append(token)
            parents.append(parent)
            depth.append(depth[parent] + 1)
            right.append(token == truth)
        return tokens, parents

    def observe(self, state: State, tree: DraftTree, scores: Scores, accepted: Accepted) -> None:
        """Learns nothing."""
