"""What a benchmark says, as files: results.json for machines, report.md and report.html for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from msd.bench.page import page
from msd.bench.report import markdown
from msd.errors import UserError


def write(results: dict[str, Any], folder: Path) -> None:
    """All three in `folder`, made if needed; UserError when they cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        (folder / "report.md").write_text(markdown(results))
        (folder / "report.html").write_text(page(results), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write results to '{folder}': {error.strerror}; choose another --out") from error
