"""The loop: draft, score, accept. The paper on one page.

Glossary
    target    the vision-language model whose output counts; its law after all logits processors is p
    drafter   whatever proposes; the law that a sampled draft came from is q
    tree      the proposed continuations below the newest emitted token, which is the root
    score     one target pass over the root and all drafts
    accept    the verifier's choice: a path of drafts, then one token of the target's own (bonus or recovered)
    τ         mean acceptance length: tokens emitted per target pass after prefill, bonus included
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
    """Continues a prefilled batch until every row has stopped; yields all that is known of each step.

    `prompt` holds the scores [B, 1, V] of the prompt's last token: a tree with nothing drafted, from which the first
    token comes as every other does. `label`: have the router's classes of emitted tokens in `Accepted.modality` even
    if the verifier does not need them.
    """
    tree = DraftTree.root_only(state.layout.newest())
    accepted = verifier.accept(tree, prompt, sampler)
    accepted.modality = None  # no drafter has seen the prompt yet
    begin = time.perf_counter()
    drafter.begin(state, prompt)
    yield Step(tree, prompt, accepted, time.perf_counter() - begin, 0.0, prefill=True)
    while sampler.alive:
        budget = plan.budget(sampler)
        state.cache.keep(sampler.alive)
        begin = time.perf_counter()
        tree = drafter.propose(state, budget, sampler)
        drafted = time.perf_counter()
        scores = target.score(state, tree)
        if verifier.routed or label:
            scores.modality = drafter.route(state, tree, scores)
        verified = time.perf_counter()
        accepted = verifier.accept(tree, scores, sampler)
        target.commit(state, accepted)
        drafter.observe(state, tree, scores, accepted)
        step = Step(tree, scores, accepted, drafted - begin, verified - drafted)
        plan.learn(budget, tree.size - 1, accepted.tokens_a_row, step.draft_seconds, step.verify_seconds)
        yield step
