"""Emitted tokens follow the target's distribution for any sampled candidates: χ² tests with 10⁵ draws per cell.

The target is a table: six tokens, and the distribution of the next one depends on the last one (with a
history-dependent processor also on earlier ones). Every cell compares the joint distribution of two or three emitted
tokens, which covers accepted, recovered and bonus tokens, with the exact product of the processed distributions. A
Bonferroni correction covers all cells: with random seeds, a correct verifier would fail once in a thousand runs; the
seeds are fixed, so the result is always the same. The planted bugs show that the statistic detects a wrong verifier,
even with fewer draws.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)
from transformers.generation.stopping_criteria import MaxLengthCriteria

from msd import drafters
from msd.certify import chi2
from msd.certify.chi2 import chi2_p_value, rejects
from msd.core.layout import Layout
from msd.core.sampling import Sampler
from msd.core.tree import Accepted, DraftTree, SampledCandidates, Scores
from msd.drafters.algorithms.msd import MSD, MSDConfig, MSDNetwork
from msd.model import SpeculativeVLM
from msd.verify import Lossless, Verifier, rejection

V, ROWS, DRAWS = 6, 10_000, 100_000
FALSE_ALARM = 1e-3
CAUGHT, FEW = 1e-6, 30_000  # wrong verifiers are detected with fewer draws
TARGET = torch.randn(V, V, generator=torch.Generator().manual_seed(0)) * 1.5  # logits after each token
DRAFT = (TARGET + torch.randn(V, V, generator=torch.Generator().manual_seed(1)) * 1.2).softmax(-1)  # q after each token


@dataclass(frozen=True)
class Drafter:
    """Drafts the `deterministic` most probable tokens of q, then `sampled` draws from q, below each newest token.

    deep: whether each of those nodes gets one more draw below it. replacement: whether a draw may repeat an earlier
    one; if not, q is renormalised without it.
    """

    sampled: int
    deterministic: int = 0
    replacement: bool = True
    deep: bool = False

    def propose(self, newest: Tensor, generator: torch.Generator) -> DraftTree:
        B, F, K = len(newest), self.deterministic, self.sampled
        first = F + K
        N = 1 + first * (2 if self.deep else 1)
        tokens, parents = torch.zeros(B, N, dtype=torch.long), torch.full((B, N), -1)
        child = torch.full((B, N, max(K, 1)), -1)
        distribution, distributions = torch.zeros_like(child), torch.zeros(B, K + first, V)
        tokens[:, 0] = newest
        q = DRAFT[newest]
        tokens[:, 1 : 1 + F] = q.topk(F).indices
        for k in range(K):
            distributions[:, k] = q
            tokens[:, 1 + F + k] = torch.multinomial(q, 1, generator=generator)[:, 0]
            if not self.replacement:
                q = q.scatter(1, tokens[:, 1 + F + k, None], 0.0)
                q = q / q.sum(-1, keepdim=True)
        valid = torch.ones(B, N, dtype=torch.bool)
        for n in range(1, 1 + first):
            same = tokens[:, 1:n] == tokens[:, n, None]
            found, where = same.max(dim=1) if n > 1 else (torch.zeros(B, dtype=torch.bool), torch.zeros(B).long())
            valid[:, n] = ~found
            if n > F:
                child[:, 0, n - 1 - F] = torch.where(found, where + 1, n)  # a repeated token shares its node
                distribution[:, 0, n - 1 - F] = n - 1 - F
        parents[:, 1 : 1 + first] = 0
        if self.deep:
            for n in range(1, 1 + first):
                below = DRAFT[tokens[:, n]]
                distributions[:, K + n - 1] = below
                tokens[:, first + n] = torch.multinomial(below, 1, generator=generator)[:, 0]
                parents[:, first + n] = n
                valid[:, first + n] = valid[:, n]
                child[:, n, 0] = torch.where(valid[:, n], first + n, -1)
                distribution[:, n, 0] = K + n - 1
        parents = parents.masked_fill(~valid, -1)
        depths = (parents >= 0).long() + (parents > 0).long()
        deterministic = torch.zeros(B, N, dtype=torch.bool)
        deterministic[:, 1 : 1 + F] = True
        height = 2 if self.deep else 1
        candidates = SampledCandidates(child, distribution, distributions)
        modality = torch.zeros_like(tokens)
        return DraftTree(tokens, parents, depths, valid, modality, deterministic, height, candidates)


class StaleDistribution(Drafter):
    """Planted bug: q is the distribution of another node."""

    def propose(self, newest: Tensor, generator: torch.Generator) -> DraftTree:
        tree = super().propose(newest, generator)
        assert tree.candidates is not None
        tree.candidates.distributions[:, : self.sampled] = DRAFT[(newest + 1) % V][:, None]
        return tree


class UnprocessedBonus(Lossless):
    """Planted bug: the token after an accepted path is drawn from raw logits."""

    def accept(self, tree: DraftTree, scores: Scores, sampler: Sampler) -> Accepted:
        self.scores = scores
        return super().accept(tree, scores, sampler)

    def _choose(self, tree: DraftTree, node: Tensor, distribution: Tensor, sampler: Sampler, rows: list[int]) -> Any:
        raw = self.scores.logits[rows, node]
        return super()._choose(
            tree, node, torch.where((tree.depths[rows, node] > 0)[:, None], raw, distribution), sampler, rows
        )


@dataclass(frozen=True)
class Cell:
    drafter: Drafter
    emitted: int = 2
    processors: list[LogitsProcessor] = field(default_factory=list)

    def counts(self, verifier: Verifier, seed: int, draws: int) -> tuple[Tensor, int]:
        """(counts [V, V, …] of `draws` answers, number of accepted drafts)."""
        generator = torch.Generator().manual_seed(seed)
        counts, drafts = torch.zeros((V,) * self.emitted, dtype=torch.long), 0
        for _ in range(draws // ROWS):
            layout = Layout.from_prompt(torch.zeros(ROWS, 1, dtype=torch.long), 1 + self.emitted)
            criteria = StoppingCriteriaList([MaxLengthCriteria(1 + self.emitted)])
            processors = LogitsProcessorList(self.processors)
            sampler = Sampler(layout, processors, criteria, True, V, generator)
            while sampler.alive:
                tree = self.drafter.propose(layout.newest(), generator)
                accepted = verifier.accept(tree, Scores(TARGET[tree.tokens]), sampler)
                drafts += sum(map(len, accepted.nodes))
            ones = torch.ones(ROWS, dtype=torch.long)
            counts.index_put_(tuple(layout.tokens[:, 1:].T), ones, accumulate=True)
        return counts, drafts

    def distribution(self) -> Tensor:
        """The exact joint distribution, [V, V, …]."""
        prefixes = torch.tensor(list(product(range(V), repeat=self.emitted)))
        text = torch.cat([torch.zeros(len(prefixes), 1, dtype=torch.long), prefixes], dim=1)
        chance = torch.ones(len(prefixes), dtype=torch.float64)
        for i in range(1, text.shape[1]):
            scores = LogitsProcessorList(self.processors)(text[:, :i], TARGET[text[:, i - 1]])
            chance *= scores.double().softmax(-1).gather(1, text[:, i, None])[:, 0]
        return chance.view((V,) * self.emitted)

    def p_value(self, seed: int = 0, verifier: Verifier | None = None, draws: int = DRAWS) -> float:
        counts, drafts = self.counts(verifier or Lossless(), seed, draws)
        assert int(counts.sum()) == draws
        assert drafts > counts.sum() / 10, "too few drafts were accepted to test anything"
        return chi2_p_value(counts.numpy(), self.distribution().numpy())


COLD: list[LogitsProcessor] = [TemperatureLogitsWarper(0.7), TopKLogitsWarper(3)]
CELLS = {
    "one trial": Cell(Drafter(1)),
    "three candidates, repeats on one node": Cell(Drafter(3)),
    "three candidates without replacement": Cell(Drafter(3, replacement=False)),
    "deterministic and sampled mixed": Cell(Drafter(2, deterministic=2)),
    "processed distribution": Cell(Drafter(2), processors=COLD),
    "history-dependent distribution": Cell(Drafter(2), processors=[RepetitionPenaltyLogitsProcessor(1.5)]),
    "two levels": Cell(Drafter(2, deep=True), emitted=3),
    "two levels, mixed, processed": Cell(Drafter(2, deterministic=1, deep=True), emitted=3, processors=COLD),
}


def test_emitted_tokens_follow_the_targets_distribution() -> None:
    values = [cell.p_value(seed) for seed, cell in enumerate(CELLS.values())]
    least = min(zip(values, CELLS, strict=True))
    assert not rejects(values, FALSE_ALARM), f"{least[1]}: p = {least[0]:.1e}"


def test_a_stale_draft_distribution_is_caught() -> None:
    assert Cell(StaleDistribution(1)).p_value(draws=FEW) < CAUGHT


def test_a_bonus_token_from_unprocessed_logits_is_caught() -> None:
    assert Cell(Drafter(2), processors=COLD).p_value(0, UnprocessedBonus(), FEW) < CAUGHT
    warm: list[LogitsProcessor] = [TemperatureLogitsWarper(0.7)]  # without top-k, no token has probability 0
    assert Cell(Drafter(2), processors=warm).p_value(0, UnprocessedBonus(), FEW) < CAUGHT


def _unnormalised(p: Tensor) -> Tensor:
    """No normalisation; the small constant allows draws from an empty residual."""
    return p + 1e-12


def test_an_unnormalised_residual_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rejection, "normalise", _unnormalised)
    assert Cell(Drafter(3)).p_value(draws=FEW) < CAUGHT


def test_drawing_from_p_instead_of_the_residual_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    first: Callable[..., Any] = rejection.try_sampled_candidates

    def from_p(tree: DraftTree, node: Tensor, p: Tensor, sampler: Sampler, rows: list[int], *rule: Any) -> Any:
        token, child = first(tree, node, p, sampler, rows, *rule)
        again = sampler.multinomial(p, rows)
        return torch.where(child >= 0, token, again), child

    monkeypatch.setattr(rejection, "try_sampled_candidates", from_p)
    assert Cell(Drafter(1)).p_value(draws=FEW) < CAUGHT


@pytest.mark.parametrize("method", ["ar", "prompt-lookup", "prompt-lookup:sampled"])
def test_the_whole_loop_follows_the_targets_distribution(method: str) -> None:
    """3,000 answers per setting; `msd verify` uses 10⁵. False alarms: once in a thousand per method."""
    assert not rejects(chi2.end_to_end_p_values(drafters.create(method), 3_000), FALSE_ALARM)


@pytest.mark.parametrize("form", ["block", "ar"])
@pytest.mark.parametrize("subtrees", [True, False])
def test_modality_subtrees_follow_the_targets_distribution(form: str, subtrees: bool) -> None:
    """Sampled candidates from several subtrees of one root; the router decides their number."""
    model = chi2.tiny_model()
    config = MSDConfig.for_target(model.config.text_config, V, form=form, subtrees=subtrees, active_from=0.0)
    drafter = MSD(MSDNetwork(config), sampled=True)
    assert not rejects(chi2.end_to_end_p_values(drafter, 3_000), FALSE_ALARM)
    engine = SpeculativeVLM(model, None, drafter=drafter.twin(model))
    _, statistics = chi2.count_answers(engine, 500, 1.0, 0)
    assert statistics.num_accepted_draft_tokens > 100
    assert statistics.num_draft_tokens > 2 * statistics.num_accepted_draft_tokens


def test_the_whole_loop_does_draft() -> None:
    engine = SpeculativeVLM(chi2.tiny_model(), None, drafter="prompt-lookup:sampled")
    counts, statistics = chi2.count_answers(engine, 500, 1.0, 0)
    assert int(counts.sum()) == 500
    assert statistics.num_accepted_draft_tokens > 100
    assert statistics.num_draft_tokens > 2 * statistics.num_accepted_draft_tokens, "and drafts are rejected too"


def test_the_whole_loop_is_caught_with_an_unnormalised_residual(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rejection, "normalise", _unnormalised)
    assert min(chi2.end_to_end_p_values(drafters.create("prompt-lookup:sampled"), 10_000)) < CAUGHT


def test_p_values_of_the_expected_distribution_are_uniform() -> None:
    """Of 400 samples from the expected distribution, about 5% have p < 0.05, with rare cells pooled."""
    generator = np.random.default_rng(0)
    distribution = np.array([0.5, 0.3, 0.15, 0.045, 0.004, 0.001, 0.0])
    values = [chi2_p_value(generator.multinomial(1000, distribution), distribution) for _ in range(400)]
    assert 0.02 < np.mean(np.array(values) < 0.05) < 0.09
    assert 0.4 < np.mean(values) < 0.6


def test_wrong_counts_have_small_p_values() -> None:
    distribution = [0.5, 0.3, 0.2]
    assert chi2_p_value([5000, 3000, 2000], distribution) == pytest.approx(1.0)
    assert chi2_p_value([5300, 2700, 2000], distribution) < 1e-6
    assert chi2_p_value([1, 999, 0], [0.0, 1.0, 0.0]) == 0.0, "an outcome of probability 0 occurred"


def test_rare_outcomes_are_pooled_and_still_count() -> None:
    distribution = [0.96] + [0.001] * 40
    assert chi2_p_value([960] + [1] * 40, distribution) > 0.9
    assert chi2_p_value([900] + [2] * 20 + [3] * 20, distribution) < 1e-6


@pytest.mark.parametrize(
    "counts, distribution", [([1, 2], [1.0]), ([5, 5], [0.5, 0.6]), ([5, 5], [1.5, -0.5]), ([2, 2], [0.5, 0.5])]
)
def test_what_cannot_be_tested_is_an_error(counts: list[int], distribution: list[float]) -> None:
    with pytest.raises(ValueError):
        chi2_p_value(counts, distribution)


def test_many_tests_reject_together() -> None:
    assert rejects([0.01, 0.04, 0.03, 0.005], 0.05)
    assert rejects([0.001, 0.02, 0.02], 0.05)
    assert not rejects([0.03, 0.03], 0.05)
    assert not rejects([], 0.05)
