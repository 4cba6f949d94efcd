"""What a benchmark says, as tables."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from msd.bench import description, errors, pairwise

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
    return (
        f"{part}{environment['threads']} threads ({environment['cpu_capability']}), {environment['dtype']}, "
        f"{environment.get('backend', 'plain')} backend"
        f"{' (lossy)' if environment.get('backend_lossy') else ''}, "
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
    yield from description.tables(results)
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
