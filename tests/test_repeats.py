"""τ outside repeated 8-grams."""

from __future__ import annotations

import pytest

from msd.bench.rows import repeating, tau_outside_repeats
from msd.core.statistics import RowStep


def test_only_what_completes_a_seen_run_repeats() -> None:
    assert repeating([1, 2, 3, 1, 2, 3, 1], n=3) == [False] * 5 + [True, True]
    assert repeating([1, 1, 1, 1], n=2) == [False, False, True, True]
    assert repeating([1, 2], n=8) == [False, False]


def test_steps_in_a_loop_do_not_count() -> None:
    tokens = [1, 2, 3, 4, 1, 2, 3, 4, 5, 6]
    # steps below token 0: (first, accepted): tokens 1-2, 3, 4-7 (a loop from token 6 on), 8-9
    steps = [RowStep(0, 1, 3, 1), RowStep(0, 3, 3, 0), RowStep(0, 4, 3, 3), RowStep(0, 8, 3, 1)]
    assert tau_outside_repeats([(steps, tokens)], n=3) == pytest.approx((2 + 1 + 2) / 3)
    assert tau_outside_repeats([(steps, tokens)], n=8) == pytest.approx((2 + 1 + 4 + 2) / 4)
    assert tau_outside_repeats([], n=8) is None
