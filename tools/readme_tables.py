"""Writes the README's tables from the committed result files; `--check` only compares. Run by `make results`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from msd.bench import report

ROOT = Path(__file__).parents[1]


def verify_table(rows: list[dict[str, Any]]) -> str:
    """The certificate, a row per method."""
    lines = [
        "| method | compared | identical | ties (largest gap) | smallest χ² p-value | passed |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        ties = f"{row['ties']} ({max(row['tie_gaps']):.0e})" if row["ties"] else "0"
        p = f"{min(row['p_values']):.2f}" if row["p_values"] else "–"
        passed = "yes" if row["passed"] else "no"
        lines.append(f"| `{row['method']}` | {row['compared']} | {row['identical']} | {ties} | {p} | {passed} |")
    return "\n".join(lines)


def main() -> int:
    """0 when the README agrees with the files (after writing it, unless `--check`)."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    tables = {
        "verify": verify_table(json.loads((ROOT / "results/verify.json").read_text())["rows"]),
        "floors": (ROOT / "results/floors.md").read_text(),
        "bench": report.markdown(json.loads((ROOT / "results/val/results.json").read_text())),
    }
    fresh = text
    for name, table in tables.items():
        block = f"<!-- {name} -->\n{table.strip()}\n<!-- /{name} -->"
        fresh = re.sub(rf"<!-- {name} -->(.*?<!-- /{name} -->)?", lambda _, b=block: b, fresh, count=1, flags=re.S)
    if "--check" not in sys.argv:
        readme.write_text(fresh)
        return 0
    return int(fresh != text)


if __name__ == "__main__":
    sys.exit(main())
