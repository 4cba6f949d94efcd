"""`threshold` and `budget` emit tokens with the distributions of `divergence.py`, for all candidates: χ², 10⁵ draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from positions import P, Q, V, accept, by_enumeration, counts, distance, draft

from msd.certify.chi2 import chi2_p_value
from msd.core import modality
from msd.verify import Budget, Threshold, Verifier
from msd.verify.divergence import budget_distribution, sampled_distribution, threshold_distribution, total_variation
from msd.verify.rejection import hard, soft

DRAWS = {
    "one sampled": 100_000,
    "three i.i.d.": 100_000,
    "deterministic without q, P above θ": 100_000,
}  # all others: 20,000
THRESHOLD = 0.7
CASES: dict[str, dict[str, Any]] = {
    "one sampled": {"distributions": Q[:1]},
    "three i.i.d.": {"distributions": [Q[0]] * 3},
    "two of different distributions": {"distributions": Q[:2]},
    "deterministic with q, one passes": {"deterministic": [1, 0, 4], "q": [0.5, 0.32, 0.1]},
    "deterministic with q, none passes": {"deterministic": [1, 3], "q": [0.6, 0.3]},
    "deterministic without q, P above θ": {"deterministic": [0, 1, 2]},
    "deterministic without q, P below θ": {"deterministic": [0, 3]},
    "mixed, deterministic first": {"deterministic": [3, 4], "q": [0.6, 0.2], "distributions": [Q[0], Q[1]]},
}
POLICIES: dict[str, Callable[[float], Verifier]] = {
    "threshold": lambda threshold: Threshold({"vision": threshold}),
    "budget": lambda threshold: Budget(1.0, {"vision": threshold}),  # ε = 1 allows any θ
}


def reported(case: dict[str, Any], policy: str, threshold: float = THRESHOLD) -> torch.Tensor:
    """The output distribution [V] from `divergence.py`."""
    p = torch.tensor(P, dtype=torch.float64)
    distributions = torch.tensor(case["distributions"], dtype=torch.float64) if "distributions" in case else None
    drafted, q = torch.zeros(V, dtype=torch.bool), torch.ones(V, dtype=torch.float64)
    drafted[case.get("deterministic", [])] = True
    if "q" in case:
        q[case["deterministic"]] = torch.tensor(case["q"], dtype=torch.float64)
    return (
        threshold_distribution(p, threshold, drafted, q, distributions)
        if policy == "threshold"
        else budget_distribution(p, threshold, drafted, distributions)
    )


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("case", CASES)
def test_draws_follow_the_distribution_and_report_its_divergence(policy: str, case: str) -> None:
    wanted, draws = by_enumeration(policy, THRESHOLD, **CASES[case]), DRAWS.get(case, 20_000)
    accepted = accept(POLICIES[policy](THRESHOLD), draft(draws, **CASES[case]), kind=modality.VISION.id)
    if max(wanted) == 1.0:
        assert int(counts(accepted)[wanted.index(1.0)]) == draws
    else:
        assert chi2_p_value(counts(accepted).numpy(), wanted) > 1e-3 / len(CASES)
    assert accepted.divergence is not None and accepted.modality is not None
    assert {round(d[0], 6) for d in accepted.divergence} == {round(distance(wanted), 6)}
    assert accepted.modality[0] == [modality.VISION.id]


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.35, 0.5, 0.7, 0.9, 1.0])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("case", CASES)
def test_the_closed_form_equals_the_enumeration(policy: str, case: str, threshold: float) -> None:
    wanted = by_enumeration(policy, threshold, **CASES[case])
    assert reported(CASES[case], policy, threshold).tolist() == pytest.approx(wanted, abs=1e-12)


def test_a_wrong_threshold_is_detected() -> None:
    """Control for the χ² test above: the counts of another θ do not fit."""
    accepted = accept(Threshold({"vision": 0.85}), draft(20_000, Q[:1]), kind=modality.VISION.id)
    assert chi2_p_value(counts(accepted).numpy(), by_enumeration("threshold", THRESHOLD, Q[:1])) < 1e-6


@pytest.mark.parametrize("policy", POLICIES)
def test_absent_candidates_are_skipped(policy: str) -> None:
    rule = hard if policy == "threshold" else soft
    p, distributions = torch.tensor([P, P], dtype=torch.float64), torch.tensor([Q[:2], Q[:2]], dtype=torch.float64)
    out = sampled_distribution(p, distributions, THRESHOLD, rule, torch.tensor([[True, True], [False, True]]))
    assert out[0].tolist() == pytest.approx(by_enumeration(policy, THRESHOLD, Q[:2]))
    assert out[1].tolist() == pytest.approx(by_enumeration(policy, THRESHOLD, Q[1:2]))


def test_the_threshold_is_that_of_the_modality_below_the_parent() -> None:
    """α = 0.6 is above the threshold of language and below the vision threshold of 0.61."""
    p, q = [0.3, 0.7, 0.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0, 0.0, 0.0]
    verifier = Threshold({"vision": 0.61})
    tree = draft(400, [q])
    tokens = {
        kind.name: {t[0] for t in accept(verifier, tree, p, kind.id).tokens}
        for kind in (modality.VISION, modality.LANGUAGE)
    }
    assert tokens == {"vision": {1}, "language": {0, 1}}
    assert {t[0] for t in accept(verifier, tree, p).tokens} == {0, 1}, "without a router every position is language"


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_a_token_with_p_zero_is_never_emitted(threshold: float) -> None:
    p, q = [0.0, 0.5, 0.5, 0.0, 0.0, 0.0], [0.8, 0.2, 0.0, 0.0, 0.0, 0.0]
    for make in POLICIES.values():
        for case in ({"distributions": [q, q]}, {"deterministic": [0, 3]}, {"deterministic": [0, 3], "q": [0.9, 0.1]}):
            accepted = accept(make(threshold), draft(300, **case), p, modality.VISION.id)  # type: ignore[arg-type]
            assert {t[0] for t in accepted.tokens} <= {1, 2}


def test_total_variation_is_half_the_absolute_difference() -> None:
    assert float(total_variation(torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.2, 0.4, 0.4]))) == pytest.approx(0.4)
