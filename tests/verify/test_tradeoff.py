"""Acceptance against TV: `budget` is monotone in θ, bounded and optimal; `threshold` is none of these."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from positions import P, Q
from torch import Tensor

from msd.verify.divergence import budget_distribution, sampled_distribution, threshold_distribution, total_variation
from msd.verify.rejection import hard, ratio, soft

quick = settings(deadline=None, derandomize=True, max_examples=60)
seeds, threshold = st.integers(0, 10**6), st.floats(0, 1)


def distributions(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, 5, generator=generator, dtype=torch.float64) * 2.5
    return logits.masked_fill(torch.rand(logits.shape, generator=generator) < 0.2, -1e9).softmax(-1)


def tv(p: Tensor, q: Tensor, at: float, rule: str = "budget") -> float:
    """TV of the output with one sampled candidate."""
    return float(total_variation(sampled_distribution(p, q[None], at, soft if rule == "budget" else hard), p))


def acceptance(p: Tensor, q: Tensor, at: float, rule: str = "budget") -> float:
    return float((q * (soft if rule == "budget" else hard)(p, q, at)).sum())


@quick
@given(seeds, threshold)
def test_the_tv_of_the_budget_equals_its_formula(seed: int, at: float) -> None:
    p, q = distributions(seed, 2)
    expected = (q - p)[(at * q <= p) & (p < q) & (p > 0)].sum()
    assert tv(p, q, at) == pytest.approx(float(expected), abs=1e-12)


@quick
@given(seeds, st.lists(threshold, min_size=2, max_size=8), st.integers(1, 4))
def test_the_tv_of_the_budget_does_not_increase_with_the_threshold(seed: int, thresholds: list[float], k: int) -> None:
    p, q = distributions(seed, 1)[0], distributions(seed + 1, k)
    tvs = [float(total_variation(sampled_distribution(p, q, at, soft), p)) for at in [*sorted(thresholds), 1.0]]
    assert all(b <= a + 1e-12 for a, b in pairwise(tvs))
    assert tvs[-1] == pytest.approx(0.0, abs=1e-12)


@quick
@given(seeds, threshold, st.integers(0, 3), st.lists(st.booleans(), min_size=5, max_size=5))
def test_tv_is_at_most_one_minus_threshold_for_any_draft(seed: int, at: float, k: int, drafted: list[bool]) -> None:
    p, q = distributions(seed, 1)[0], distributions(seed + 1, 3)
    out = budget_distribution(p, at, torch.tensor(drafted), q[:k] if k else None)
    assert float(total_variation(out, p)) <= 1 - at + 1e-12
    assert float(out.sum()) == pytest.approx(1.0)


@quick
@given(seeds, threshold)
def test_the_budget_gains_its_tv_in_acceptance_and_no_rule_gains_more(seed: int, at: float) -> None:
    p, q = distributions(seed, 2)
    lossless = float((q * ratio(p, q)).sum())
    assert acceptance(p, q, at) == pytest.approx(lossless + tv(p, q, at), abs=1e-9)
    assert acceptance(p, q, at, "threshold") <= lossless + tv(p, q, at, "threshold") + 1e-9


def test_threshold_is_not_monotone_and_never_lossless() -> None:
    p, q = torch.tensor([[0.01, 0.29, 0.70], [0.50, 0.30, 0.20]], dtype=torch.float64)
    tvs = [tv(p, q, at, "threshold") for at in (0.0, 0.5, 1.0)]
    assert tvs == pytest.approx([0.5, 0.01, 0.30])
    assert min(tv(p, q, i / 1000, "threshold") for i in range(1001)) > 0.009


def test_threshold_can_be_slower_and_lossy() -> None:
    """At θ = 0.6 and α = 0.58, 0.57 and 1 it accepts 20% of the drafts; `lossless` accepts 66%."""
    p, q = torch.tensor([[0.29, 0.17, 0.54], [0.50, 0.30, 0.20]], dtype=torch.float64)
    assert acceptance(p, q, 0.6, "threshold") == pytest.approx(0.20)
    assert float(torch.minimum(p, q).sum()) == pytest.approx(0.66)
    assert tv(p, q, 0.6, "threshold") == pytest.approx(0.46)
    assert threshold_distribution(p, 0.6, distributions=q[None]).tolist() == pytest.approx([0.0, 0.0, 1.0])
    assert tv(p, q, 0.6) == 0.0
    assert acceptance(p, q, 0.5) == pytest.approx(1.0), "at θ = 0.5 `budget` accepts all drafts"
    assert tv(p, q, 0.5) == pytest.approx(0.34), "with a smaller TV than `threshold`"


def test_the_tv_of_deterministic_candidates_is_the_excluded_probability() -> None:
    p, drafted = torch.tensor(P, dtype=torch.float64), torch.tensor([True, True, True, False, False, False])
    assert float(total_variation(budget_distribution(p, 0.75, drafted), p)) == pytest.approx(0.25)
    assert float(total_variation(budget_distribution(p, 0.76, drafted), p)) == 0.0
    assert float(total_variation(threshold_distribution(p, 0.3, drafted), p)) == pytest.approx(0.70), (
        "one token has probability 1"
    )
    assert float(total_variation(budget_distribution(p, 1.0, drafted, torch.tensor(Q, dtype=torch.float64)), p)) < 1e-12
