"""Compares benchmark results with the project's floors and aims: `python -m recipes.floors.table results`.

Prints a table and writes it to `floors.md` in that folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from msd.system.files import read_json, write_whole

BATCHES = (1, 2, 4, 8, 16)
Line = tuple[str, float | None, str, float, float]


def row(folder: Path, method: str, task: str) -> dict[str, Any]:
    """Returns a row of a benchmark; an empty one if it was not run."""
    path = folder / "results.json"
    if not path.exists():
        return {}
    rows = read_json(path, "measure it again with 'make floors'", finite=False)["rows"]
    return next((r for r in rows if (r["method"], r["task"]) == (method, task)), {})


def interval(found: dict[str, Any]) -> str:
    """Formats the 95% interval of the speedup over `ar`."""
    edges = found.get("speedup_vs_ar_interval")
    return f"{edges[0]:.2f}–{edges[1]:.2f}" if edges else ""


def figures(results: Path) -> Iterator[Line]:
    """Yields (figure, measured, 95% interval, floor, aim)."""
    val = results / "val"
    plain = row(val, "transformers", "all").get("speedup_decode_only")
    yield "`ar` vs `transformers`, decode only", plain and 1 / plain, "", 0.99, 1.7
    detail, caption, vqa = (row(val, "msd", task) for task in ("detail", "caption", "vqa"))
    yield "`msd` vs `ar`, `detail`", detail.get("speedup_vs_ar"), interval(detail), 2.4, 2.6
    yield "`msd` vs `transformers`, `detail`", detail.get("speedup_vs_transformers"), "", 2.4, 4.5
    sampled = row(results / "val-T1", "msd", "all")
    yield "`msd` vs `ar` at T = 1, same seed", sampled.get("speedup_vs_ar"), interval(sampled), 1.45, 1.6
    yield "`msd` vs `transformers`, `caption`", caption.get("speedup_vs_transformers"), "", 1.8, 2.4
    yield "`msd` vs `ar`, `vqa`", vqa.get("speedup_vs_ar"), interval(vqa), 0.97, 1.2
    for size in BATCHES[1:]:
        found = row(results / f"batch-{size}", "msd", "all")
        yield f"`msd` vs `ar`, batches of {size}", found.get("speedup_vs_ar"), interval(found), 0.97, 1.0
        found = row(results / f"noise-{size}", "msd", "all")
        yield f"noise images at T = 1.5, batches of {size}", found.get("speedup_vs_ar"), interval(found), 0.97, 1.0
    found = row(results / "noise-1", "msd", "all")
    yield "noise images at T = 1.5, one at a time", found.get("speedup_vs_ar"), interval(found), 0.97, 1.0
    found = row(results / "unseen", "msd", "all")
    yield "`msd` vs `ar`, unlike the training data", found.get("speedup_vs_ar"), interval(found), 0.98, 1.0


def verdict(value: float | None, floor: float, aim: float) -> str:
    """Returns "aim", "floor" or "missed". A figure whose floor is above its aim has to be small."""
    if value is None:
        return ""
    sign = -1 if floor > aim else 1
    return "aim" if sign * value >= sign * aim else "floor" if sign * value >= sign * floor else "missed"


def lines(results: Path) -> Iterator[str]:
    """Yields the lines of the table."""
    yield "| figure | measured | 95% | floor | aim | |"
    yield "|---|---|---|---|---|---|"
    for name, value, edges, floor, aim in figures(results):
        shown = "–" if value is None else f"{value:.2f}x"
        yield f"| {name} | {shown} | {edges} | {floor:.2f}x | {aim:.2f}x | {verdict(value, floor, aim)} |"
    whole = row(results / "val", "msd", "all")
    for name, key, floor, aim in (("host share of `msd`", "host_share", 0.08, 0.05), ("identical", "identical", 1, 1)):
        value = whole.get(key)
        shown = "–" if value is None else f"{value:.1%}"
        yield f"| {name} | {shown} | | {floor:.0%} | {aim:.0%} | {verdict(value, floor, aim)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    folder = parser.parse_args().results
    text = "\n".join(lines(folder)) + "\n"
    write_whole(folder / "floors.md", text)
    print(text, end="")


if __name__ == "__main__":
    main()
