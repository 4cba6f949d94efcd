"""What a benchmark says, as files: results.json for machines, report.md and report.html for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from msd.bench.page import page
from msd.bench.report import markdown
from msd.system.files import make_folder, write_whole


def write(results: dict[str, Any], folder: Path) -> None:
    """All three in `folder`, made if needed; UserError when they cannot be written."""
    make_folder(folder)
    write_whole(folder / "results.json", json.dumps(results, indent=1) + "\n")
    write_whole(folder / "report.md", markdown(results))
    write_whole(folder / "report.html", page(results))
