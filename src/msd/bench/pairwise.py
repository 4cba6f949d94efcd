"""Several seeds of a method ("standard seed 0", …) count as one method, and one method of all is MSD.

That is MSD with as much training as the control and the rivals had, where it was measured; the one that ships was
trained longer, and is compared apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from msd.drafters.algorithms.msd import CONTROL, OURS, SHIPPED

__all__ = ["CONTROL", "SHIPPED", "grouped", "ours"]

_SEED = re.compile(r" seed \d+$")


def grouped(methods: Iterable[str]) -> dict[str, list[str]]:
    """Name without a seed -> the method of that name, or else its seeds, in their order."""
    groups: dict[str, list[str]] = {}
    for method in dict.fromkeys(methods):
        groups.setdefault(_SEED.sub("", method), []).append(method)
    return {name: [name] if name in found else found for name, found in groups.items()}


def ours(groups: dict[str, list[str]]) -> str | None:
    """The group that stands for MSD, the first that was measured; None where there is none."""
    return next((name for name in OURS if name in groups), None)


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


def tables(results: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, head, rows) of MSD's table, and of one for what ships if that was trained longer.

    None where samples' seconds were not kept or no MSD was measured.
    """
    seconds: dict[str, list[float]] = results.get("sample_seconds") or {}
    groups = grouped(seconds)
    name = ours(groups)
    if name is None or len(groups) < 2:
        return []
    found = [_table(results, seconds, groups, name)]
    if name != SHIPPED in groups:
        title, head, rows = _table(results, seconds, groups, SHIPPED)
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
