"""Compares MSD with the other methods of a benchmark.

The tables: speedup over each other method; speedup per task, and acceptance rate per modality, against `standard`, the
same drafter without its modality-aware parts. Seeds of one method ("msd seed 0", "msd seed 1", …) count as one method.
If an MSD drafter with the same training time as its rivals was measured, the comparison uses it. The shipped drafter,
which was trained longer, is then compared in a separate table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import torch

from msd.drafters.algorithms.msd import CONTROL, OURS, SHIPPED

Table = tuple[str, list[str], list[list[str]]]  # title, column heads, rows
RESAMPLES, LEVEL = 2000, 0.95
_SEED = re.compile(r" seed \d+$")
_TASKS = {
    "all": "all tasks",
    "vqa": "VQA",
    "cocoqa": "COCO-QA (in the place of GQA)",
    "chat": "conversation",
    "ocr": "OCR (stress task)",
}


def ratio_interval(base: Sequence[float], own: Sequence[float]) -> list[float] | None:
    """Returns [low, high], the 95% paired bootstrap interval of Σ base / Σ own over samples; None below two samples.

    base, own: seconds of each sample, in the same order. The result is deterministic.
    """
    n = len(base)
    if n < 2:
        return None
    indices = torch.randint(n, (RESAMPLES, n), generator=torch.Generator().manual_seed(0))
    sums = [torch.tensor(list(seconds), dtype=torch.float64)[indices].sum(1) for seconds in (base, own)]
    edges = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    return [float(edge) for edge in (sums[0] / sums[1].clamp_min(1e-12)).quantile(edges)]


def grouped(methods: Iterable[str]) -> dict[str, list[str]]:
    """Groups methods by name without seed. If a method without seed has that name, its seeds are left out."""
    groups: dict[str, list[str]] = {}
    for method in dict.fromkeys(methods):
        groups.setdefault(_SEED.sub("", method), []).append(method)
    return {name: [name] if name in seeds else seeds for name, seeds in groups.items()}


def mean_seconds(seconds: Mapping[str, Sequence[float]], methods: Iterable[str]) -> list[float]:
    """Returns the mean seconds of each sample over some methods, the seeds of one."""
    return [fmean(each) for each in zip(*(seconds[method] for method in methods), strict=True)]


def _msd(groups: dict[str, list[str]]) -> str | None:
    """Returns the group that represents MSD; None if no MSD drafter was measured."""
    return next((name for name in OURS if name in groups), None)


def tables(results: dict[str, Any]) -> list[Table]:
    """Returns the tables of MSD's speedup over the other methods; empty without MSD or the seconds of each sample."""
    seconds: dict[str, list[float]] = results.get("sample_seconds") or {}
    groups = grouped(seconds)
    name = _msd(groups)
    if name is None or len(groups) < 2:
        return []
    speedups = [_speedups(results, seconds, groups, name)]
    if name != SHIPPED in groups:
        title, head, rows = _speedups(results, seconds, groups, SHIPPED)
        speedups.append((f"{title} (trained longer than all others)", head, rows))
    return speedups


def _speedups(
    results: dict[str, Any], seconds: dict[str, list[float]], groups: dict[str, list[str]], name: str
) -> Table:
    """Returns the table of the speedup of the group `name` over every other group."""
    tasks: list[str] = results["sample_tasks"]
    columns = [] if len(set(tasks)) == 1 else list(dict.fromkeys(tasks))
    several = any(len(methods) > 1 for methods in groups.values())
    own, rows = mean_seconds(seconds, groups[name]), []
    for other, methods in groups.items():
        if other == name:
            continue
        base = mean_seconds(seconds, methods)
        edges = ratio_interval(base, own)
        row = [other, _ratio(base, own), "–" if edges is None else f"{edges[0]:.2f}–{edges[1]:.2f}"]
        for task in columns:
            indices = [i for i, t in enumerate(tasks) if t == task]
            row.append(_ratio([base[i] for i in indices], [own[i] for i in indices]))
        pairs = list(zip(methods, groups[name], strict=False)) if len(methods) == len(groups[name]) > 1 else []
        rows.append(row + [", ".join(_ratio(seconds[a], seconds[b]) for a, b in pairs) or "–"] * several)
    head = ["against", "all", "95%", *columns, *["seed by seed"] * several]
    return f"Speedup of `{name}` over each other method, end to end", head, rows


def _ratio(base: Sequence[float], own: Sequence[float]) -> str:
    return f"{sum(base) / sum(own):.2f}"


def summary(results: dict[str, Any]) -> list[Table]:
    """Returns MSD against `standard`: speedup per task and, if measured, acceptance rate per modality.

    Empty unless both methods were measured. COCO-QA replaces the GQA of the MSD paper; OCR is a stress task.
    """
    groups = grouped(row["method"] for row in results["rows"])
    name = _msd(groups)
    if name is None or CONTROL not in groups:
        return []
    standard, ours = (_rows_by_task(results, groups[n]) for n in (CONTROL, name))
    speed = []
    for task in (task for task in standard if task in ours):
        title = _TASKS.get(re.sub(r"[^a-z]", "", task.lower()), task)
        speed.append([title, *_compare(standard[task], ours[task], lambda row: row["speedup_vs_ar"])])
    head = ["standard", "MSD" if name == SHIPPED else f"MSD (`{name}`)", "improvement"]
    compared = [("Speedup per task, end to end over `ar`", ["task", *head], speed)]
    both = (_acceptance(row) for row in (*standard["all"], *ours["all"]))
    measured = dict.fromkeys(m for rates in both for m, rate in rates.items() if rate is not None)
    accepted = [
        [m, *_compare(standard["all"], ours["all"], lambda row, m=m: _acceptance(row).get(m))] for m in measured
    ]
    if accepted:
        compared.append(("Acceptance rate per modality, chains of depth 5", ["modality", *head], accepted))
    return compared


def _rows_by_task(results: dict[str, Any], methods: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Returns task -> rows of these methods, one per seed."""
    rows = [r for r in results["rows"] if r["method"] in methods]
    return {task: [r for r in rows if r["task"] == task] for task in dict.fromkeys(r["task"] for r in rows)}


def _acceptance(row: dict[str, Any]) -> dict[str, float | None]:
    return row.get("acceptance_by_modality") or {}


def _compare(
    standard: list[dict[str, Any]], ours: list[dict[str, Any]], value: Callable[..., float | None]
) -> list[str]:
    """Returns three cells: the mean over seeds of either method, and the relative improvement."""
    means = []
    for rows in (standard, ours):
        values = [v for v in map(value, rows) if v is not None]
        means.append(fmean(values) if values else None)
    a, b = means
    if a is None or b is None:
        return ["–" if x is None else f"{x:.2f}" for x in means] + ["–"]
    return [f"{a:.2f}", f"{b:.2f}", f"{100 * (b / a - 1):+.0f}%" if a else "–"]
