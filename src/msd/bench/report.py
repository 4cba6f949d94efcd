"""The description's two tables, for what was measured here: speedup per task, and acceptance per modality.

`standard` is MSD's own trunk, vocabulary, budget and plan with every modality part off; both have the same training.
Several seeds of a method ("msd seed 0", …) are averaged. COCO-QA stands in the place of GQA; OCR is a stress task.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from msd.bench import errors, pairwise, plots
from msd.system.files import make_folder, write_whole

TASKS = {
    "all": "all tasks",
    "vqa": "VQA",
    "cocoqa": "COCO-QA (in the place of GQA)",
    "chat": "conversation",
    "conversation": "conversation",
    "ocr": "OCR (stress task)",
}

Row = dict[str, Any]


def summary(results: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, head, rows) of both; the second where acceptance was measured; none without both methods."""
    groups = pairwise.grouped(row["method"] for row in results["rows"])
    name = pairwise.ours(groups)
    if name is None or pairwise.CONTROL not in groups:
        return []
    standard, ours = (_rows(results, groups[n]) for n in (pairwise.CONTROL, name))
    speed = [
        [TASKS.get(re.sub(r"[^a-z]", "", task.lower()), task), *_compared(standard[task], ours[task], _speed)]
        for task in standard
        if task in ours
    ]
    head = ["standard", "MSD" if name == pairwise.SHIPPED else f"MSD (`{name}`)", "improvement"]
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


_COLUMNS = {
    "method": "method",
    "speedup_vs_ar": "vs `ar`",
    "speedup_vs_ar_interval": "95%",
    "speedup_vs_transformers": "vs `transformers`",
    "speedup_decode_only": "decode only, vs `ar`",
    "tokens_per_second": "tokens/s",
    "mean_acceptance_length": "τ",
    "tau_without_bonus": "τ without bonus",
    "identical": "identical",
    "mean_answer_tokens": "answer tokens",
    "host_share": "host share",
}
_BY_MODALITY = {"acceptance_by_modality": "acceptance", "coverage_by_modality": "coverage"}


def described(environment: dict[str, Any]) -> str:
    """How it was measured, in a few sentences."""
    outside = environment.get("outside_kernels") or {}
    shares = ", ".join(f"{share:.0%} with {nodes} nodes" for nodes, share in outside.items())
    part = f"Broken off: {environment['broken_off']} are measured. " if environment.get("broken_off") else ""
    refused = "".join(f" `{name}` does not run here ({why})." for name, why in environment.get("not_run", {}).items())
    products = (environment.get("kernels") or {}).items()
    kernels = ", ".join(f"{name}: {'/'.join(dict.fromkeys(used))}" for name, used in products)
    return (
        f"{part}{environment['threads']} threads ({environment['cpu_capability']}), {environment['dtype']}, "
        f"{environment.get('backend', 'plain')} backend"
        f"{' (lossy)' if environment.get('backend_lossy') else ''}"
        f"{f' ({kernels})' if kernels else ''}, "
        f"torch {environment['torch']}, transformers {environment['transformers']}; {environment['settings']}. "
        "End to end unless a column says otherwise; all methods ran on every sample, interleaved, caches empty. "
        "What a method gains over `ar` is drafting; what `ar` gains over `transformers` is kernel work."
        f"{f' Of a target pass at least {shares} is spent outside operators.' if shares else ''}{refused}"
    )


def tables(results: dict[str, Any]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """(title, head, rows) per task. Acceptance (chain) and coverage (tree) by modality where they were measured."""
    columns = dict(_COLUMNS)
    if any(row.get("speedup_warm_vs_ar") for row in results["rows"]):
        columns |= {"speedup_warm_vs_ar": "warm, vs `ar`"}
    kinds = list(dict.fromkeys(k for row in results["rows"] for name in _BY_MODALITY for k in row.get(name) or ()))
    if kinds:
        columns |= {name: f"{title}, {' / '.join(kinds)}" for name, title in _BY_MODALITY.items()}
    for task in dict.fromkeys(row["task"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["task"] == task]
        rows = [row | {n: {k: row[n].get(k) for k in kinds} for n in _BY_MODALITY if row.get(n)} for row in rows]
        cells = [[_cell(row.get(name)) for name in columns] for row in rows]
        mass = (results.get("target_top_mass") or {}).get(task)
        sure = "" if mass is None else f", the target's likeliest 1/4/8 tokens hold {_cell(mass)}"
        yield f"{task} ({rows[0]['samples']} samples{sure})", list(columns.values()), cells


def comparisons(results: dict[str, Any]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """(title, head, rows) of the comparisons that there are figures for."""
    yield from pairwise.tables(results)
    yield from summary(results)
    yield from errors.tables(results)


def markdown(results: dict[str, Any], tasks: Collection[str] | None = None) -> str:
    """A table per task, or for `tasks` alone; then the comparisons."""
    lines = [described(results["environment"])]
    for title, head, rows in tables(results):
        name, _, count = title.partition(" ")
        if tasks is not None and name not in tasks:
            continue
        lines += ["", f"**{name}** {count}", "", _line(head), _line("---" for _ in head), *map(_line, rows)]
    for title, head, rows in comparisons(results):
        lines += ["", f"**{title}**", "", _line(head), _line("---" for _ in head), *map(_line, rows)]
    return "\n".join(lines) + "\n"


def _line(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return " / ".join(map(_cell, value.values()))
    if isinstance(value, list):
        return "–".join(map(_cell, value))
    if value is None:
        return "–"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
figure { display: inline-block; margin: 0 1rem 1rem 0; vertical-align: top } figcaption { font-weight: 600 }
svg { max-width: 100%; height: auto } .wide { overflow-x: auto }
table { border-collapse: collapse; margin: .5rem 0 1.5rem } td, th { padding: .25rem .6rem; text-align: right }
td:first-child, th:first-child { text-align: left } th { border-bottom: 2px solid #999; font-weight: 600 }
tr:nth-child(even) td { background: #f4f4f4 }
"""


def page(results: dict[str, Any]) -> str:
    """HTML of `results`, as `measure.run` gives them."""
    figures = "".join(
        f"<figure><figcaption>{_text(title)}</figcaption>{svg}</figure>\n"
        for title, svg in plots.all_of(results).items()
    )
    parts = [f"<p>{_text(described(results['environment']))}</p>", figures]
    for title, head, rows in (*tables(results), *comparisons(results)):
        parts.append(f"<h2>{_text(title)}</h2><div class='wide'><table><tr>{_cells(head, 'th')}</tr>")
        parts += [f"<tr>{_cells(row, 'td')}</tr>" for row in rows]
        parts.append("</table></div>")
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>msd bench</title>"
        f"<style>{STYLE}</style></head><body><h1>msd bench</h1>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _cells(values: list[str], tag: str) -> str:
    return "".join(f"<{tag}>{_text(value)}</{tag}>" for value in values)


def _text(words: str) -> str:
    """Escaped, with `code` marks turned into tags."""
    pieces = html.escape(words).split("`")
    return "".join(f"<code>{piece}</code>" if i % 2 else piece for i, piece in enumerate(pieces))


def write(results: dict[str, Any], folder: Path) -> None:
    """All three in `folder`, made if needed; UserError when they cannot be written."""
    make_folder(folder)
    write_whole(folder / "results.json", json.dumps(results, indent=1) + "\n")
    write_whole(folder / "report.md", markdown(results))
    write_whole(folder / "report.html", page(results))
