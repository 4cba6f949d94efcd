"""χ² goodness of fit for drawn tokens, and Holm's correction for many such tests at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

LEAST_EXPECTED = 5.0  # Cochran's rule: with fewer expected draws in a cell the statistic does not follow χ²


def chi2_p_value(counts: ArrayLike, expected_probabilities: ArrayLike) -> float:
    """How often counts would be at least this far from the law if they had been drawn from it.

    counts: draws per outcome, any shape. expected_probabilities: the law, same shape, summing to 1. Outcomes with fewer
    than 5 expected draws are pooled into one. A draw of an outcome of probability 0 gives 0.0 at once.
    """
    seen = np.asarray(counts, dtype=np.float64).ravel()
    law = np.asarray(expected_probabilities, dtype=np.float64).ravel()
    if seen.shape != law.shape:
        raise ValueError(f"{seen.size} counts for {law.size} probabilities")
    if not np.isclose(law.sum(), 1.0, atol=1e-4) or law.min() < 0:
        raise ValueError(f"the expected probabilities sum to {law.sum():.6f} (least {law.min():.2g}), not to 1")
    if seen[law == 0].any():
        return 0.0
    expected = law / law.sum() * seen.sum()
    seen, expected = _pool(seen, expected)
    if len(seen) < 2:
        raise ValueError(f"{int(seen.sum())} draws are too few to test this law")
    statistic = float(((seen - expected) ** 2 / expected).sum())
    return float(stats.chi2.sf(statistic, len(seen) - 1))


def _pool(seen: np.ndarray, expected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Merges the outcomes that are too rare, and if need be the next rarest, until every cell expects 5 draws."""
    order = np.argsort(expected, kind="stable")
    seen, expected = seen[order], expected[order]
    rare = int((expected < LEAST_EXPECTED).sum())
    while rare < len(expected) and 0.0 < expected[:rare].sum() < LEAST_EXPECTED:
        rare += 1
    if rare == 0:
        return seen, expected
    pooled = (np.append(seen[rare:], seen[:rare].sum()), np.append(expected[rare:], expected[:rare].sum()))
    keep = pooled[1] > 0  # outcomes that cannot happen, and did not
    return pooled[0][keep], pooled[1][keep]


def holm(p_values: Sequence[float], alpha: float) -> list[bool]:
    """Which hypotheses to reject so that any false rejection at all happens with probability at most `alpha`.

    Holm (1979): the i-th smallest of m p-values is rejected while it is at most alpha / (m - i), i from 0.
    """
    rejected = [False] * len(p_values)
    for i, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[index] > alpha / (len(p_values) - i):
            break
        rejected[index] = True
    return rejected
