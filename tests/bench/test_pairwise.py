"""MSD against the other methods: ratios of summed seconds; seeds of a method count as one method."""

from __future__ import annotations

from typing import Any

import pytest

from msd.bench import pairwise
from msd.bench.pairwise import ratio_interval


def results(**seconds: list[float]) -> dict[str, Any]:
    named = {name.replace("_", " "): values for name, values in seconds.items()}
    return {"sample_seconds": named, "sample_tasks": ["a", "b", "a"]}


def test_ratios_per_task_and_seed() -> None:
    ((title, head, rows),) = pairwise.tables(
        results(
            ar=[3.0, 4.0, 5.0],
            msd_seed_0=[1.0, 1.0, 1.0],
            msd_seed_1=[1.0, 3.0, 1.0],
            standard_seed_0=[2.0, 2.0, 2.0],
            standard_seed_1=[2.0, 2.0, 6.0],
        )
    )
    assert "`msd`" in title and head == ["against", "all", "95%", "a", "b", "seed by seed"]
    own = [1.0, 2.0, 1.0]
    cells = {row[0]: row[1:] for row in rows}
    assert cells.keys() == {"ar", "standard"}
    assert cells["ar"][0] == "3.00" and cells["ar"][2:] == ["4.00", "2.00", "–"]
    assert cells["standard"][0] == "2.00" and cells["standard"][2:] == ["3.00", "1.00", "2.00, 2.00"]
    low, high = ratio_interval([2.0, 2.0, 4.0], own) or []
    assert cells["standard"][1] == f"{low:.2f}–{high:.2f}"


def test_equally_trained_msd_is_compared_first_and_the_shipped_one_separately() -> None:
    measured = results(ar=[3.0, 3.0, 3.0], msd=[1.0, 1.0, 1.0], standard=[2.0, 2.0, 2.0])
    measured["sample_seconds"]["msd:30min"] = [1.5, 1.5, 1.5]
    (equal, _, rows), (longer, _, shipped) = pairwise.tables(measured)
    assert "`msd:30min`" in equal and "`msd`" in longer and "longer" in longer
    assert {row[0]: row[1] for row in rows} == {"ar": "2.00", "msd": "0.67", "standard": "1.33"}
    assert {row[0]: row[1] for row in shipped} == {"ar": "3.00", "standard": "2.00", "msd:30min": "1.50"}


def test_a_single_task_gets_no_column() -> None:
    alone = results(ar=[1.0, 2.0, 3.0], msd=[1.0, 1.0, 1.0]) | {"sample_tasks": ["a"] * 3}
    ((_, head, rows),) = pairwise.tables(alone)
    assert head == ["against", "all", "95%"] and [row[:2] for row in rows] == [["ar", "2.00"]]


@pytest.mark.parametrize("measured", [{}, results(ar=[1.0, 1.0, 1.0]), results(msd=[1.0, 1.0, 1.0])])
def test_nothing_to_compare(measured: dict[str, Any]) -> None:
    assert pairwise.tables(measured) == []
