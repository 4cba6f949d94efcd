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

from msd.core.sampling import Sampler
from msd.core.tree import DraftTree, Scores, Step
from msd.drafters.base import Drafter
from msd.planning.plan import Plan
from msd.targets.base import Target
from msd.targets.state import State
from msd.verify import Verifier


def decode(
    target: Target,
    drafter: Drafter,
    verifier: Verifier,
    plan: Plan,
    sampler: Sampler,
    state: State,
    prompt: Scores,
    label: bool = False,
) -> Iterator[Step]:
    """Continues a prefilled batch until every row has finished; yields each step.

    prompt: the scores [B, 1, V] of the prompt's last token. They count as the scores of a tree without drafts, which
    gives the first token of each answer. label: whether to fill `Accepted.modality` even if the verifier does not need
    it.
    """
    tree = DraftTree.root_only(state.layout.newest())
    accepted = verifier.accept(tree, prompt, sampler)
    accepted.modality = None  # the router has not run yet
    start = time.perf_counter()
    drafter.begin(state, prompt)
    yield Step(tree, prompt, accepted, time.perf_counter() - start, 0.0, prefill=True)
    while sampler.alive:
        budget = plan.budget(sampler, state.cache.node_bytes)
        state.cache.keep(sampler.alive)
        start = time.perf_counter()
        tree = drafter.propose(state, budget, sampler)
        drafted = time.perf_counter()
        scores = target.score(state, tree)
        if verifier.routed or label:
            scores.modality = drafter.route(state, tree, scores)
        scored = time.perf_counter()
        accepted = verifier.accept(tree, scores, sampler)
        target.commit(state, accepted)
        drafter.observe(state, tree, scores, accepted)
        step = Step(tree, scores, accepted, drafted - start, scored - drafted)
        plan.learn(budget, tree.size - 1, accepted.tokens_per_row, step.draft_seconds, step.score_seconds)
        yield step
