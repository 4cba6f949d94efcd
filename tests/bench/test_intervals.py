"""The paired bootstrap against closed forms."""

from __future__ import annotations

import pytest
import torch

from msd.bench.pairwise import ratio_interval


def test_a_constant_ratio_has_no_width() -> None:
    own = [0.1, 0.4, 0.2, 0.9]
    assert ratio_interval([2 * s for s in own], own) == pytest.approx([2.0, 2.0])
    assert ratio_interval([1.0], [1.0]) is None


def test_its_width_matches_the_delta_method_and_it_covers_the_true_ratio() -> None:
    inside = 0
    for seed in range(40):
        noise = torch.Generator().manual_seed(seed)
        own = 1 + 0.2 * torch.rand(80, generator=noise)
        base = 1.5 * own * (1 + 0.1 * torch.randn(80, generator=noise))
        low, high = ratio_interval(base.tolist(), own.tolist()) or (0.0, 0.0)
        spread = float((base - base.sum() / own.sum() * own).std() / (own.mean() * 80**0.5))
        assert high - low == pytest.approx(2 * 1.96 * spread, rel=0.2)
        inside += low <= 1.5 <= high
    assert inside >= 34  # 95% of 40 is 38; 34 or fewer has a chance below 3%


def test_pairing_narrows_it() -> None:
    slow = [0.1 * (1 + i % 7) for i in range(70)]
    fast = [s / 1.4 + 0.001 * (i % 3) for i, s in enumerate(slow)]
    paired = ratio_interval(slow, fast)
    mixed = ratio_interval(slow, fast[1:] + fast[:1])
    assert paired and mixed
    assert paired[1] - paired[0] < 0.2 * (mixed[1] - mixed[0])
