"""The description's two tables, for what was measured here: speedup per task, and acceptance per modality.

`standard` is MSD's own trunk, vocabulary, budget and plan with every modality part off; both have the same training.
Several seeds of a method ("msd seed 0", …) are averaged. COCO-QA stands in the place of GQA; OCR is a stress task.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from msd.bench import seeds

TASKS = {
    "all": "all tasks",
    "vqa": "VQA",
    "cocoqa": "COCO-QA (in the place of GQA)",
    "chat": "conversation",
    "conversation": "conversation",
    "ocr": "OCR (stress task)",
}

Row = dict[str, Any]


def tables(results: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, head, rows) of both; the second where acceptance was measured; none without both methods."""
    groups = seeds.grouped(row["method"] for row in results["rows"])
    name = seeds.ours(groups)
    if name is None or seeds.CONTROL not in groups:
        return []
    standard, ours = (_rows(results, groups[n]) for n in (seeds.CONTROL, name))
    speed = [
        [TASKS.get(re.sub(r"[^a-z]", "", task.lower()), task), *_compared(standard[task], ours[task], _speed)]
        for task in standard
        if task in ours
    ]
    head = ["standard", "MSD" if name == seeds.SHIPPED else f"MSD (`{name}`)", "improvement"]
    found = [("Speedup per task, end to end over `ar`", ["task", *head], speed)]
    both = (row.get("acceptance_by_modality") or {} for row in (*standard["all"], *ours["all"]))
    measured = dict.fromkeys(m for rates in both for m, rate in rates.items() if rate is not None)
    if accepted := [[m, *_compared(standard["all"], ours["all"], _accepted(m))] for m in measured]:
        found.append(("Acceptance rate per modality, chains of depth 5", ["modality", *head], accepted))
    return found


def _rows(results: dict[str, Any], methods: list[str]) -> dict[str, list[Row]]:
    """Task -> rows of a method, one for each of its seeds."""
    rows = [r for r in results["rows"] if r["method"] in methods]
    return {task: [r for r in rows if r["task"] == task] for task in dict.fromkeys(r["task"] for r in rows)}


def _compared(standard: list[Row], ours: list[Row], value: Callable[[Row], float | None]) -> list[str]:
    """Cells: both means, and how much larger the second is in parts of the first."""
    a, b = (_mean([v for v in map(value, rows) if v is not None]) for rows in (standard, ours))
    if a is None or b is None:
        return ["–" if x is None else f"{x:.2f}" for x in (a, b)] + ["–"]
    return [f"{a:.2f}", f"{b:.2f}", f"{100 * (b / a - 1):+.0f}%" if a else "–"]


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _speed(row: Row) -> float | None:
    return row["speedup_vs_ar"]


def _accepted(modality: str) -> Callable[[Row], float | None]:
    return lambda row: (row.get("acceptance_by_modality") or {}).get(modality)
