"""How sure a speedup is: paired bootstrap over samples (Efron and Tibshirani 1993, chapter 13).

A sample's times of two methods stay together, since both answered the same prompt on the same machine in the same run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

DRAWS, LEVEL = 2000, 0.95


def ratio_interval(base: Sequence[float], mine: Sequence[float]) -> list[float] | None:
    """[low, high], the 95% interval of Σ base / Σ mine over samples; the same bits each time. None below two samples.

    base, mine: seconds of each sample, in the same order.
    """
    n = len(base)
    if n < 2:
        return None
    drawn = torch.randint(n, (DRAWS, n), generator=torch.Generator().manual_seed(0))
    sums = [torch.tensor(list(seconds), dtype=torch.float64)[drawn].sum(1) for seconds in (base, mine)]
    edges = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    return [float(edge) for edge in (sums[0] / sums[1].clamp_min(1e-12)).quantile(edges)]
