"""`calibrate`: the smallest θ for a divergence budget, on recorded positions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from msd.errors import UserError
from msd.verify import Budget, Threshold, calibrate, create, policies
from msd.verify.builtin.budget import _costs, _mean
from msd.verify.divergence import budget_distribution, total_variation


def records(n: int = 400, vocabulary: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """(p, q, drafted), each [n, V]: a draft distribution close to the target's, and its three most probable tokens."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(n, vocabulary, generator=generator) * 2
    q = (logits + torch.randn(n, vocabulary, generator=generator) * 0.7).softmax(-1)
    return logits.softmax(-1), q, torch.zeros(n, vocabulary, dtype=torch.bool).scatter(1, q.topk(3).indices, True)


def mean_divergence(p: Tensor, q: Tensor, threshold: float) -> float:
    """The mean TV that `calibrate` bounds."""
    return _mean(*_costs("records", p, q), threshold)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.8, 1.0])
def test_mean_divergence_equals_that_of_the_output_distributions(threshold: float) -> None:
    p, q, drafted = records()
    p = p.double()
    sampled = total_variation(budget_distribution(p, threshold, distributions=q.double()[:, None]), p).mean()
    ranked = total_variation(budget_distribution(p, threshold, drafted), p).mean()
    assert mean_divergence(p, q, threshold) == pytest.approx(float(sampled), abs=1e-6)
    assert mean_divergence(p, drafted, threshold) == pytest.approx(float(ranked), abs=1e-6)


@pytest.mark.parametrize("epsilon", [0.001, 0.01, 0.05])
def test_the_smallest_threshold_within_epsilon_is_found(epsilon: float) -> None:
    p, q, drafted = records()
    for kind in (q, drafted):
        threshold = calibrate({"vision": (p, kind)}, epsilon)["vision"]
        assert 0.9 * epsilon < mean_divergence(p, kind, threshold) <= epsilon
        assert mean_divergence(p, kind, threshold - 1e-3) > epsilon or threshold < 1e-3


def test_more_budget_means_a_smaller_threshold_for_each_modality() -> None:
    p, q, drafted = records()
    found = [calibrate({"language": (p, q), "vision": (p, drafted)}, e) for e in (0.0, 0.01, 0.1, 1.0)]
    for name in ("language", "vision"):
        thresholds = [f[name] for f in found]
        assert thresholds == sorted(thresholds, reverse=True)
        assert (thresholds[0], thresholds[-1]) == (1.0, 0.0)


def test_bad_records_are_one_clear_line() -> None:
    p, q, _ = records(5)
    with pytest.raises(UserError, match="outside"):
        calibrate({"vision": (p, q)}, 1.5)
    with pytest.raises(UserError, match="unknown modality 'smell'"):
        calibrate({"smell": (p, q)}, 0.1)
    for bad in ((p, q[:4]), (p[0], q[0]), (p[:0], q[:0])):
        with pytest.raises(UserError, match="must both be"):
            calibrate({"vision": bad}, 0.1)


def test_policies_and_their_settings() -> None:
    assert policies() == ["lossless", "threshold", "budget"]
    assert isinstance(create("threshold", {"vision": 0.9}), Threshold)
    assert isinstance(create("budget", epsilon=0.1), Budget)
    assert not create("lossless").routed
    for wrong, line in (
        (("greedy",), "unknown verifier 'greedy'; known: lossless, threshold, budget"),
        (("lossless", {"vision": 0.5}), "no thresholds"),
        (("threshold", None, 0.1), "no epsilon"),
        (("threshold", {"vision": 1.1}), "outside"),
        (("budget", {"smell": 0.1}), "unknown modality"),
        (("budget", None, -0.1), "outside"),
    ):
        with pytest.raises(UserError, match=line):
            create(*wrong)  # type: ignore[arg-type]
