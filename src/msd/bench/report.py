"""Writes the results of a benchmark as JSON, Markdown and one HTML page."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Template

from msd.backends.kernels import ROWS
from msd.bench import errors, pairwise, plots
from msd.bench.disturbance import SLOWER
from msd.bench.pairwise import Table
from msd.bench.timing import PLAIN, TRANSFORMERS
from msd.system.files import make_folder, write_whole

_COLUMNS = {
    "method": "method",
    "speedup_vs_best_plain": "vs best plain",
    "speedup_vs_best_plain_interval": "95%",
    "speedup_vs_ar": "vs `ar`",
    "speedup_vs_ar_interval": "95%",
    "speedup_vs_ar_paired_median": "median of the ratios per sample",
    "speedup_vs_transformers": "vs `transformers`",
    "speedup_decode_only": "decode only, vs `ar`",
    "tokens_per_second": "tokens/s",
    "mean_acceptance_length": "τ",
    "tau_without_bonus": "τ without bonus",
    "target_passes": "target passes",
    "identical": "identical",
    "mean_answer_tokens": "answer tokens",
    "host_share": "host share",
}
_BY_MODALITY = {"acceptance_by_modality": "acceptance", "coverage_by_modality": "coverage"}
TEMPLATE = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"), autoescape=True)


def write(results: dict[str, Any], folder: Path) -> None:
    """Writes results.json, report.md and report.html to `folder`. Raises UserError if that fails."""
    make_folder(folder)
    write_whole(folder / "results.json", json.dumps(results, indent=1) + "\n")
    write_whole(folder / "report.md", markdown(results))
    write_whole(folder / "report.html", page(results))


def by_rows(kernels: Sequence[str]) -> str:
    """The kernels of a product, or the code of whole passes, and from which number of rows each is used."""
    changes = [i for i in range(len(kernels)) if i == 0 or kernels[i] != kernels[i - 1]]
    return ", ".join(f"{kernels[i]} from {ROWS[i]} rows" if i else kernels[i] for i in changes)


def described(environment: dict[str, Any]) -> str:
    """Returns the conditions of the measurement in a few sentences."""
    outside = environment.get("outside_kernels") or {}
    shares = ", ".join(f"{share:.0%} ({nodes} nodes)" for nodes, share in outside.items())
    partial = f"Interrupted: {environment['broken_off']} are measured. " if environment.get("broken_off") else ""
    refused = "".join(f" `{name}` does not run here ({why})." for name, why in environment.get("not_run", {}).items())
    kernels = "; ".join(f"{name}: {by_rows(used)}" for name, used in (environment.get("kernels") or {}).items())
    repeated = environment.get("remeasured")
    return (
        f"{partial}{environment['threads']} threads ({environment['cpu_capability']}), {environment['dtype']}, "
        f"{environment.get('backend', 'plain')} backend"
        f"{' (lossy)' if environment.get('backend_lossy') else ''}{f' ({kernels})' if kernels else ''}, "
        f"torch {environment['torch']}, transformers {environment['transformers']}; {environment['settings']}. "
        "Times are end to end unless a column states otherwise. All methods answered every sample, interleaved, with "
        "empty caches. `ar` is this library's decoding without drafts: speedup over `ar` comes from drafting, speedup "
        "of `ar` over `transformers` from faster kernels."
        f"{f' A target pass spends at least {shares} of its time outside operators.' if shares else ''}"
        f"{refused}{'' if repeated is None else _repeated(repeated)}"
    )


def _repeated(counts: dict[str, int]) -> str:
    """Returns a sentence about the disturbed samples."""
    if not counts["samples"]:
        return f" No method took more than {SLOWER:g} times its usual time on any sample."
    return (
        f" Samples on which a method took more than {SLOWER:g} times its usual time were measured again, with all "
        f"methods: {counts['samples']}, of which {counts['still_disturbed']} still take that long."
    )


def tables(results: dict[str, Any]) -> Iterator[Table]:
    """Yields a table per task. By modality, acceptance is that of draft chains, coverage that of draft trees."""
    measured = {name for row in results["rows"] for name in row}
    columns = {name: title for name, title in _COLUMNS.items() if name in measured}
    if any(row.get("speedup_warm_vs_ar") for row in results["rows"]):
        columns |= {"speedup_warm_vs_ar": "warm, vs `ar`"}
    kinds = list(dict.fromkeys(k for row in results["rows"] for name in _BY_MODALITY for k in row.get(name) or ()))
    if kinds:
        columns |= {name: f"{title}, {' / '.join(kinds)}" for name, title in _BY_MODALITY.items()}
    for task in dict.fromkeys(row["task"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["task"] == task]
        rows = [row | {n: {k: row[n].get(k) for k in kinds} for n in _BY_MODALITY if row.get(n)} for row in rows]
        cells = [[cell(row.get(name)) for name in columns] for row in rows]
        top = (results.get("target_top_mass") or {}).get(task)
        likely = f"; the target's 1 / 4 / 8 most probable tokens hold {cell(top)} of the probability" if top else ""
        yield f"{task} ({rows[0]['samples']} samples{_best_plain(rows)}{likely})", list(columns.values()), cells


def _best_plain(rows: list[dict[str, Any]]) -> str:
    """Returns which plain decoding is the best on a task, with the seconds of both; empty if it was not compared."""
    best = rows[0].get("best_plain")
    if best is None:
        return ""
    seconds = ", ".join(f"`{r['method']}` {r['seconds']:.1f} s" for r in rows if r["method"] in (PLAIN, TRANSFORMERS))
    return f"; best plain decoding: `{best}` ({seconds})"


def comparisons(results: dict[str, Any]) -> Iterator[Table]:
    """Yields the comparisons of MSD with other methods, and of rejected drafts, that the results allow."""
    yield from pairwise.tables(results)
    yield from pairwise.summary(results)
    yield from errors.tables(results)


def markdown(results: dict[str, Any], tasks: Collection[str] | None = None) -> str:
    """Returns the report as Markdown, with a table for each task in `tasks` (all by default)."""
    lines = [described(results["environment"])]
    for title, head, rows in tables(results):
        name, _, count = title.partition(" ")
        if tasks is None or name in tasks:
            lines += ["", f"**{name}** {count}", "", _line(head), _line("---" for _ in head), *map(_line, rows)]
    for title, head, rows in comparisons(results):
        lines += ["", f"**{title}**", "", _line(head), _line("---" for _ in head), *map(_line, rows)]
    return "\n".join(lines) + "\n"


def _line(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"


def cell(value: Any) -> str:
    """Formats a figure, an interval, or figures by name; "–" if it was not measured."""
    if isinstance(value, dict):
        return " / ".join(map(cell, value.values()))
    if isinstance(value, list):
        return "–".join(map(cell, value))
    if value is None:
        return "–"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def page(results: dict[str, Any]) -> str:
    """Returns the report as an HTML page with plots."""
    return TEMPLATE.render(
        conditions=described(results["environment"]),
        plots=plots.all_of(results),
        tables=[*tables(results), *comparisons(results)],
    )
