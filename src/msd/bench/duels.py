"""MSD against every other method, by the seconds of the same samples: ratios above 1 are MSD's.

Seeds of a method ("standard seed 0", …) count as one method: a sample's seconds are their mean, so that the interval
is over samples, and the ratio of each pair of seeds stands beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msd.bench import seeds
from msd.bench.intervals import ratio_interval


def tables(results: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, head, rows) of MSD's table, and of one for what ships if that was trained longer.

    None where samples' seconds were not kept or no MSD was measured.
    """
    seconds: dict[str, list[float]] = results.get("sample_seconds") or {}
    groups = seeds.grouped(seconds)
    name = seeds.ours(groups)
    if name is None or len(groups) < 2:
        return []
    found = [_table(results, seconds, groups, name)]
    if name != seeds.SHIPPED in groups:
        title, head, rows = _table(results, seconds, groups, seeds.SHIPPED)
        found.append((f"{title} (trained longer than all others)", head, rows))
    return found


def _table(
    results: dict[str, Any], seconds: dict[str, list[float]], groups: dict[str, list[str]], name: str
) -> tuple[str, list[str], list[list[str]]]:
    """How much faster the group `name` is than every other."""
    tasks: list[str] = results["sample_tasks"]
    asked = [] if len(set(tasks)) == 1 else list(dict.fromkeys(tasks))
    several = any(len(methods) > 1 for methods in groups.values())
    mine, rows = _mean([seconds[m] for m in groups[name]]), []
    for other, methods in groups.items():
        if other == name:
            continue
        theirs = _mean([seconds[m] for m in methods])
        edges = ratio_interval(theirs, mine)
        row = [other, _ratio(theirs, mine), "–" if edges is None else f"{edges[0]:.2f}–{edges[1]:.2f}"]
        for task in asked:
            chosen = [i for i, t in enumerate(tasks) if t == task]
            row.append(_ratio([theirs[i] for i in chosen], [mine[i] for i in chosen]))
        pairs = list(zip(methods, groups[name], strict=False)) if len(methods) == len(groups[name]) > 1 else []
        rows.append(row + [", ".join(_ratio(seconds[a], seconds[b]) for a, b in pairs) or "–"] * several)
    head = ["against", "all", "95%", *asked, *["seed by seed"] * several]
    return f"How much faster `{name}` is, end to end", head, rows


def _mean(columns: Sequence[Sequence[float]]) -> list[float]:
    return [sum(values) / len(values) for values in zip(*columns, strict=True)]


def _ratio(base: Sequence[float], mine: Sequence[float]) -> str:
    return f"{sum(base) / sum(mine):.2f}"
