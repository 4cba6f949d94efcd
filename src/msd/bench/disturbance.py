"""Finds measurements that something else on the machine disturbed: one method several times slower than usual.

The usual time of a method on a sample follows from what it did there and from its other samples: its prefill, and
target passes whose time grows with the drafts that each one verifies. So a sample with many drafts, such as one where a
method tries whether drafting pays, takes its usual time; and a method that is always slow does too. The library's own
drafting is not judged: it does not count its passes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import median

from msd.bench.timing import LIBRARY, TRANSFORMERS, Run

SLOWER = 3.0  # times the usual time
FEWEST = 5  # samples; below that nothing is usual
REPEATS = 2  # of the measurement of one sample, at most


def disturbed(runs: Mapping[str, Sequence[Run]]) -> dict[int, str]:
    """Returns the disturbed groups of samples: index -> reason. runs: by method, one per group.

    The reason names the method with the longest delay.
    """
    found: dict[int, tuple[float, str]] = {}
    for name, usual in usual_seconds(runs).items():
        for index, (run, expected) in enumerate(zip(runs[name], usual, strict=False)):
            factor, delay = run.seconds / max(expected, 1e-9), run.seconds - expected
            if factor > SLOWER and delay > found.get(index, (0.0, ""))[0]:
                found[index] = delay, f"{name} took {factor:.1f} times its usual time"
    return {index: reason for index, (_, reason) in sorted(found.items())}


def usual_seconds(runs: Mapping[str, Sequence[Run]]) -> dict[str, list[float]]:
    """Returns the usual seconds of each judged method on each group of samples; empty with fewer than `FEWEST`."""
    columns = list(zip(*runs.values(), strict=False))  # an interrupted run lacks some of the last one
    if len(columns) < FEWEST:
        return {}
    known = [[run.prefill for run in column if run.prefill is not None] for column in columns]
    prefills = [min(column, default=0.0) for column in known]  # the same work in every method
    judged = [name for name in runs if name == TRANSFORMERS or name not in LIBRARY]
    return {name: _usual(runs[name][: len(columns)], prefills) for name in judged}


def _usual(own: Sequence[Run], prefills: Sequence[float]) -> list[float]:
    """Returns the usual seconds of one method. prefills: of each group, by the fastest method."""
    ratios = [run.prefill / p for run, p in zip(own, prefills, strict=True) if run.prefill is not None and p > 0]
    usual = [p * median(ratios) if ratios else p for p in prefills]
    passes = list(map(_passes, own))
    drafts = [run.statistics.num_draft_tokens / max(1, n) for run, n in zip(own, passes, strict=True)]
    points = [
        (x, (run.seconds - (p if run.prefill is None else run.prefill)) / n)
        for run, n, x, p in zip(own, passes, drafts, usual, strict=True)
        if n > 0
    ]
    start, slope = line(points)
    return [p + n * (start + slope * x) for p, n, x in zip(usual, passes, drafts, strict=True)]


def _passes(run: Run) -> int:
    """Returns the number of target passes after prefill; a batch shares them."""
    if run.statistics.steps:
        return max(Counter(step.row for step in run.statistics.steps).values())
    return max(map(len, run.answers)) - 1


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Fits y = start + slope · x, slope ≥ 0, to points with outliers: (start, slope).

    Medians over all pairs, and then over all points (Theil 1950, Sen 1968), bear up to 29% of outliers.
    """
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in combinations(points, 2) if a[0] != b[0]]
    slope = max(0.0, median(slopes)) if slopes else 0.0
    return (median(y - slope * x for x, y in points) if points else 0.0), slope
