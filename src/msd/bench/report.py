"""What a benchmark says, as files: results.json for machines, report.md for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from msd.errors import UserError

_COLUMNS = {
    "method": "method",
    "speedup_vs_ar": "vs `ar`",
    "speedup_vs_transformers": "vs `transformers`",
    "speedup_decode_only": "decode only, vs `ar`",
    "tokens_per_second": "tokens/s",
    "mean_acceptance_length": "τ",
    "tau_without_bonus": "τ without bonus",
    "identical": "identical",
    "mean_answer_tokens": "answer tokens",
}
_BY_MODALITY = {"acceptance_by_modality": "acceptance", "coverage_by_modality": "coverage"}


def markdown(results: dict[str, Any]) -> str:
    """A table per task. Acceptance (chain) and coverage (tree) by modality where they were measured."""
    environment = results["environment"]
    lines = [
        f"{environment['threads']} threads ({environment['cpu_capability']}), {environment['dtype']}, "
        f"{environment.get('backend', 'plain')} backend, "
        f"torch {environment['torch']}, transformers {environment['transformers']}; {environment['settings']}. "
        "End to end unless a column says otherwise; all methods ran on every sample, interleaved, caches empty."
    ]
    columns = dict(_COLUMNS)
    if any(row.get(name) for row in results["rows"] for name in _BY_MODALITY):
        columns |= {name: f"{title}, vision / language / fusion" for name, title in _BY_MODALITY.items()}
    for task in dict.fromkeys(row["task"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["task"] == task]
        lines += [
            "",
            f"**{task}** ({rows[0]['samples']} samples)",
            "",
            _line(columns.values()),
            _line("---" for _ in columns),
        ]
        lines += [_line(_cell(row.get(name)) for name in columns) for row in rows]
    return "\n".join(lines) + "\n"


def write(results: dict[str, Any], folder: Path) -> None:
    """results.json and report.md in `folder`, made if needed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        (folder / "report.md").write_text(markdown(results))
    except OSError as error:
        raise UserError(f"cannot write results to '{folder}': {error.strerror}; choose another --out") from error


def _line(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return " / ".join(map(_cell, value.values()))
    if value is None:
        return "–"
    return f"{value:.2f}" if isinstance(value, float) else str(value)
