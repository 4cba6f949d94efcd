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

from collections.abc import Iterator

from msd.drafters.base import Drafter
from msd.plan import Plan
from msd.sampling import Sampler
from msd.statistics import Statistics
from msd.targets.base import Target
from msd.targets.state import State
from msd.tree import Accepted, DraftTree, Scores
from msd.verify import Verifier


def decode(
    target: Target,
    drafter: Drafter,
    verifier: Verifier,
    plan: Plan,
    sampler: Sampler,
    state: State,
    prompt: Scores,
    statistics: Statistics,
    label: bool = False,
) -> Iterator[Accepted]:
    """Continues a prefilled batch until every row has stopped; yields what each step emitted.

    `prompt` holds the scores [B, 1, V] of the prompt's last token: a tree with nothing drafted, from which the first
    token comes as every other does. `label`: have the router's classes of emitted tokens in `Accepted.modality` even
    if the verifier does not need them.
    """
    first = verifier.accept(DraftTree.root_only(state.layout.newest()), prompt, sampler)
    first.modality = None  # no drafter has seen the prompt yet
    with statistics.timed("draft"):
        drafter.begin(state, prompt)
    yield first
    while sampler.alive:
        rows, budget = len(sampler.alive), plan.budget(sampler)
        state.cache.keep(sampler.alive)
        with statistics.timed("draft"):
            tree = drafter.propose(state, budget, sampler)
        with statistics.timed("verify"):
            scores = target.score(state, tree)
            if verifier.routed or label:
                scores.modality = drafter.route(state, tree, scores)
        accepted = verifier.accept(tree, scores, sampler)
        target.commit(state, accepted)
        drafter.observe(state, tree, scores, accepted)
        statistics.count(tree, accepted)
        plan.learn(budget, tree.size - 1, sum(map(len, accepted.tokens)) / rows, statistics.latest)
        yield accepted
