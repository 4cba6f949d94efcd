"""The speculative decoding loop: draft, score, accept.

Glossary
    target    the vision-language model whose output counts; p is its distribution after all logits processors
    drafter   proposes tokens; q is the distribution that a sampled draft was drawn from
    tree      the drafted continuations of the newest emitted token, which is the root
    score     one target pass over the root and all drafts
    accept    the verifier's decision: a path of drafts, then one token from the target (bonus or recovered token)
    τ         mean acceptance length: tokens emitted per target pass after prefill, bonus token included
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from msd.core import trust
from msd.core.sampling import Sampler
from msd.core.tree import DraftTree, Scores, Step
from msd.drafters.base import Drafter
from msd.planning.plan import Plan
from msd.targets.base import Target
from msd.targets.state import State
from msd.verify import Verifier


@dataclass(frozen=True)
class Engine:
    """What decodes a batch.

    label: whether to fill `Accepted.modality` even if the verifier does not need it. foresight: whether drafts may
    depend on the noise of coming draws where they cannot change the output.
    """

    target: Target
    drafter: Drafter
    verifier: Verifier
    plan: Plan
    label: bool = False
    foresight: bool = True

    def begin(self, sampler: Sampler, state: State, prompt: Scores) -> Step:
        """Emits the first token of every row of a prefilled batch.

        prompt: the scores [B, 1, V] of the prompt's last token. They count as the scores of a tree without drafts.
        """
        sampler.foresees = self.foresight and self.verifier.lossless and not self.drafter.sampled
        tree = DraftTree.root_only(state.layout.newest())
        accepted = self.verifier.accept(tree, prompt, sampler)
        accepted.modality = None  # the router has not run yet
        state.trust = self.plan.trust(state.layout, sampler.do_sample)
        start = time.perf_counter()
        self.drafter.begin(state, prompt)
        return Step(tree, prompt, accepted, time.perf_counter() - start, 0.0, prefill=True)

    def step(self, sampler: Sampler, state: State, watched: bool = True) -> Step:
        """Drafts, scores and accepts once, in the rows of `sampler.alive`; the cache drops all others.

        watched: whether someone reads the labels of a step without drafts.
        """
        budget = self.plan.budget(sampler, state.cache.node_bytes, state.trust)
        state.cache.keep(sampler.alive)
        start = time.perf_counter()
        tree = self.drafter.propose(state, budget, sampler)
        drafted = time.perf_counter()
        scores = self.target.score(state, tree)
        if self.verifier.routed or (self.label and (watched or tree.size > 1)):
            scores.modality = self.drafter.route(state, tree, scores)
        scored = time.perf_counter()
        accepted = self.verifier.accept(tree, scores, sampler)
        self.target.commit(state, accepted)
        self.drafter.observe(state, tree, scores, accepted)
        if budget.shift is not None:
            trust.learn(state.trust, tree, accepted)
        step = Step(tree, scores, accepted, drafted - start, scored - drafted)
        self.plan.learn(budget, tree.size - 1, accepted.tokens_per_row, step.draft_seconds, step.score_seconds)
        return step

    @property
    def joins(self) -> bool:
        """Whether requests can join and leave a batch without a change to any answer.

        The answers of lossy policies and of sampled candidates depend on how much is drafted, and so on the others.
        """
        return self.drafter.joinable and not self.drafter.sampled and self.verifier.lossless

    def join(self, state: State, other: State) -> None:
        """Appends the rows of `other` to a batch; both have begun. UserError if the drafter cannot join them."""
        self.drafter.join(state, other)
        state.join(other)
        state.trust = state.trust + other.trust

    def select(self, state: State, rows: list[int]) -> None:
        """Drops all other rows of a batch; `rows`, all unfinished, become rows 0, 1, … in this order."""
        self.drafter.select(state, rows)
        state.select(rows)
        state.trust = [state.trust[row] for row in rows]


def decode(engine: Engine, sampler: Sampler, state: State, prompt: Scores) -> Iterator[Step]:
    """Continues a prefilled batch until every row has finished; yields each step. prompt: see `Engine.begin`."""
    yield engine.begin(sampler, state, prompt)
    while sampler.alive:
        yield engine.step(sampler, state)
