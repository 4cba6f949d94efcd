"""`budget` on complete answers: ε = 0, greedy decoding, and the exact bound nε with a tiny vocabulary."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.stopping_criteria import MaxLengthCriteria

from msd.certify.chi2 import chi2_p_value
from msd.core import modality
from msd.core.layout import Layout
from msd.core.sampling import Sampler
from msd.core.tree import DraftTree, SampledCandidates, Scores
from msd.verify import Budget, Lossless, Threshold, Verifier
from msd.verify.builtin.budget import Ledger
from msd.verify.divergence import sampled_distribution, total_variation
from msd.verify.rejection import soft

V, N, EPSILON = 3, 3, 0.12
TARGET = torch.randn(V, V, generator=torch.Generator().manual_seed(0))  # logits after each token
DRAFT = (TARGET + torch.randn(V, V, generator=torch.Generator().manual_seed(2)) * 0.8).softmax(-1)  # q after each token
quick = settings(deadline=None, derandomize=True, max_examples=60)


def sampler(rows: int, room: int, do_sample: bool = True, seed: int | None = None) -> Sampler:
    """With a seed each row has its own generator, otherwise all rows share one."""
    layout = Layout.from_prompt(torch.zeros(rows, 1, dtype=torch.long), room + 8)
    one = torch.Generator().manual_seed(0)
    each = [torch.Generator().manual_seed(seed + row) for row in range(rows)] if seed is not None else one
    criteria = StoppingCriteriaList([MaxLengthCriteria(1 + room)])
    return Sampler(layout, LogitsProcessorList(), criteria, do_sample, V, each)


def sampled(newest: torch.Tensor, generator: torch.Generator) -> DraftTree:
    """One draw from DRAFT below each newest token."""
    B = len(newest)
    tree = DraftTree.from_lists(newest, [[0]] * B, [[0]] * B, deterministic=[[False]] * B)
    tree.tokens[:, 1] = torch.multinomial(DRAFT[newest], 1, generator=generator)[:, 0]
    child = torch.tensor([[1], [-1]]).expand(B, -1, -1)
    return replace(tree, candidates=SampledCandidates(child, torch.zeros_like(child), DRAFT[newest][:, None]))


def ranked(seed: int, newest: torch.Tensor) -> DraftTree:
    """Random deterministic trees with random q; siblings have different tokens."""
    rng = random.Random(seed)
    rows: list[tuple[list[int], list[int]]] = []
    for _ in newest:
        tokens: list[int] = []
        parents: list[int] = []
        for _ in range(rng.randint(1, 8)):
            pair = rng.randint(0, min(len(tokens), 4)), rng.randrange(V)
            if pair not in zip(parents, tokens, strict=True):
                parents.append(pair[0])
                tokens.append(pair[1])
        rows.append((tokens, parents))
    tree = DraftTree.from_lists(newest, [t for t, _ in rows], [p for _, p in rows])
    return replace(tree, q=torch.rand(tree.tokens.shape, generator=torch.Generator().manual_seed(seed)))


def answers(verifier: Verifier, tree: Callable[[torch.Tensor, int], DraftTree], own: Sampler) -> list[list[int]]:
    step = 0
    while own.alive:
        drafts = tree(own.layout.newest(), step)
        verifier.accept(drafts, Scores(TARGET[drafts.tokens]), own)
        step += 1
    return [own.layout.history(row)[1:].tolist() for row in range(own.layout.batch)]


@quick
@given(st.integers(0, 10**6), st.booleans())
def test_a_budget_of_zero_is_lossless_seed_for_seed(seed: int, draws: bool) -> None:
    def tree(newest: torch.Tensor, step: int) -> DraftTree:
        if draws:
            return sampled(newest, torch.Generator().manual_seed(seed + step))
        return ranked(seed + step, newest)

    lowest = dict.fromkeys(["language", "vision", "fusion"], 0.0)
    assert answers(Budget(0.0, lowest), tree, sampler(3, 6, seed=seed)) == answers(
        Lossless(), tree, sampler(3, 6, seed=seed)
    )


def test_a_budget_does_change_the_answers() -> None:
    """Control for the test above: a policy that ignores θ would pass it."""

    def tree(newest: torch.Tensor, step: int) -> DraftTree:
        return ranked(step, newest)

    spending, plain = sampler(40, 6, seed=5), sampler(40, 6, seed=5)
    assert answers(Budget(0.6, {"language": 0.0}), tree, spending) != answers(Lossless(), tree, plain)


@quick
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.3, 1.0]), st.booleans())
def test_greedy_decoding_gives_the_argmax_at_every_threshold(seed: int, threshold: float, draws: bool) -> None:
    greedy, newest = [], 0
    for _ in range(6):
        newest = int(TARGET[newest].argmax())
        greedy.append(newest)

    def tree(newest: torch.Tensor, step: int) -> DraftTree:
        return sampled(newest, torch.Generator().manual_seed(seed + step)) if draws else ranked(seed + step, newest)

    for verifier in (Threshold({"language": threshold}), Budget(1.0, {"language": threshold})):
        assert answers(verifier, tree, sampler(2, 6, do_sample=False)) == [greedy] * 2


def joint(budget: float) -> dict[tuple[int, ...], float]:
    """The exact joint distribution of N tokens, for one draw from DRAFT per step and a bonus token if accepted."""
    distribution: dict[tuple[int, ...], float] = defaultdict(float)

    def extend(text: tuple[int, ...], ledger: Ledger, probability: float, bonus: bool) -> None:
        if len(text) == N or probability == 0.0:
            distribution[text] += probability
            return
        last = text[-1] if text else 0
        p, q = TARGET[last].double().softmax(-1), DRAFT[last].double()
        threshold = ledger.threshold(
            float(total_variation(sampled_distribution(p, q[None], ledger.preferred, soft), p))
        )
        out = p if bonus else sampled_distribution(p, q[None], threshold, soft)
        accepted = torch.zeros_like(p) if bonus else q * soft(p, q, threshold)
        after = replace(ledger)
        after.spend(float(total_variation(out, p)))
        for y in range(V):
            extend((*text, y), after, probability * float(accepted[y]), True)
            extend((*text, y), after, probability * float(out[y] - accepted[y]), False)

    extend((), Ledger(budget, 0.0), 1.0, False)
    return distribution


def target() -> dict[tuple[int, ...], float]:
    p = TARGET.double().softmax(-1)
    return {
        text: float(torch.stack([p[a, b] for a, b in zip((0, *text), text, strict=False)]).prod())
        for text in product(range(V), repeat=N)
    }


@pytest.mark.parametrize("budget", [0.0, 0.02, EPSILON, 0.3])
def test_n_tokens_are_at_most_n_epsilon_away(budget: float) -> None:
    distribution, p = joint(budget), target()
    assert sum(distribution.values()) == pytest.approx(1.0)
    distance = sum(abs(distribution[text] - p[text]) for text in p) / 2
    assert distance <= N * budget + 1e-12
    assert distance > 0.1 * N * budget or budget == 0.0, "some of the budget is spent"


def test_sampled_answers_follow_the_joint_distribution_and_report_their_divergence() -> None:
    rows = 15_000
    own, generator = sampler(rows, N), torch.Generator().manual_seed(1)
    verifier = Budget(EPSILON, {"language": 0.0})
    spent = torch.zeros(rows)
    while own.alive:
        tree = sampled(own.layout.newest(), generator)
        accepted = verifier.accept(tree, Scores(TARGET[tree.tokens]), own)
        assert accepted.divergence is not None
        assert [len(d) for d in accepted.divergence] == [len(t) for t in accepted.tokens]
        spent += torch.tensor([sum(d) for d in accepted.divergence])
    index = (own.layout.tokens[:, 1 : 1 + N] * torch.tensor([9, 3, 1])).sum(1)
    distribution = joint(EPSILON)
    counts = torch.bincount(index, minlength=V**N)
    assert chi2_p_value(counts.numpy(), [distribution[text] for text in product(range(V), repeat=N)]) > 1e-3
    assert chi2_p_value(counts.numpy(), [target()[text] for text in product(range(V), repeat=N)]) < 1e-6
    assert float(spent.max()) <= N * EPSILON + 1e-6
    assert float(spent.mean()) > 0.1 * N * EPSILON


@quick
@given(st.lists(st.floats(0, 1), max_size=60), st.floats(0, 1), st.floats(0, 1))
def test_the_mean_is_within_epsilon_after_every_position(share: list[float], epsilon: float, preferred: float) -> None:
    """For any share of the TV that θ allows at each position."""
    ledger = Ledger(epsilon, preferred)
    for part in share:
        cost = part * (1 - ledger.preferred)
        threshold = ledger.threshold(cost)
        assert 0.0 <= threshold <= 1.0
        ledger.spend(cost if threshold == ledger.preferred else part * (1 - threshold))
        assert ledger.spent <= epsilon * ledger.count + 1e-9


def test_the_ledger_does_not_leave_the_budget_unspent() -> None:
    generator = torch.Generator().manual_seed(0)
    for preferred in (0.0, 0.5, 0.99):
        ledger = Ledger(0.05, preferred)
        for alpha in torch.rand(2000, generator=generator).sqrt().tolist():
            threshold = ledger.threshold(1 - alpha if alpha >= ledger.preferred else 0.0)
            ledger.spend(1 - alpha if alpha >= threshold else 0.0)
        assert 0.8 * 0.05 < ledger.spent / ledger.count <= 0.05


def test_each_modality_of_each_answer_has_its_own_ledger() -> None:
    verifier, own = Budget(0.3, {"vision": 0.0, "fusion": 0.0}), sampler(2, 40, seed=0)
    paid: dict[tuple[int, int], list[float]] = defaultdict(list)
    step = 0
    while own.alive:
        tree = ranked(step, own.layout.newest())
        kinds = torch.randint(0, 3, tree.tokens.shape, generator=torch.Generator().manual_seed(step))
        accepted = verifier.accept(tree, Scores(TARGET[tree.tokens], None, kinds), own)
        assert accepted.divergence is not None and accepted.modality is not None
        for row in range(2):
            for kind, spent in zip(accepted.modality[row], accepted.divergence[row], strict=True):
                paid[row, kind].append(spent)
                assert sum(paid[row, kind]) <= 0.3 * len(paid[row, kind]) + 1e-6
        step += 1
    assert {kind for _, kind in paid} == {m.id for m in (modality.LANGUAGE, modality.VISION, modality.FUSION)}
    again = sampler(1, 1)
    assert verifier._ledger(again, 0, 0).count == 0, (
        "another request starts with a new ledger, so a seed always gives the same answer"
    )
