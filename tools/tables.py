"""Writes tables of README and docs from the committed result files; `--check` only compares. Run by `make results`."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from msd.bench import report
from msd.errors import UserError
from msd.system.files import read_json, write_whole

ROOT = Path(__file__).parents[1]
KINDS = ("vision", "language", "fusion")
EVENT_KINDS = ("event_sparse", "event_dense", "video_reasoning", "language")


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


def policies_table(measured: dict[str, dict[str, dict[str, Any]]]) -> str:
    """What every policy bought and cost, by temperature."""
    lines = [
        "| T | policy | vs `ar` | τ | TV a token | by modality | same answer | same tokens | CIDEr |",
        "|---" * 9 + "|",
    ]
    for temperature, policies in measured.items():
        for name, row in policies.items():
            spent = row["divergence"] or {}
            kinds = (spent.get("by_modality") or {}).items()
            each = ", ".join(f"{kind} {value['per_token']:.3f}" for kind, value in kinds) or "–"
            told = f"{spent['per_token']:.4f} | {each}" if spent else "0 | –"
            gained = f"{row['speedup_vs_ar']:.2f} | {row['mean_acceptance_length']:.2f}"
            same = f"{row['answers_equal_to_lossless']:.0%} | {row['tokens_equal_to_lossless']:.0%}"
            lines.append(f"| {temperature} | `{name}` | {gained} | {told} | {same} | {row['cider']:.2f} |")
    return "\n".join(lines)


def trained_table(rows: dict[str, dict[str, Any]], modalities: tuple[str, ...]) -> str:
    """What every row of equal training time reached on held-out answers, best first."""
    kinds = ("acceptance", *modalities)
    lines = [f"| row | steps | {' | '.join(kinds)} |", "|---" * (2 + len(kinds)) + "|"]
    for name, row in sorted(rows.items(), key=lambda item: -item[1]["held_out"]["acceptance"]):
        found = row["held_out"]
        told = set(modalities) <= found.keys()  # else it knows other classes, and only theirs were counted
        rates = " | ".join(f"{found[kind]:.3f}" if told else "–" for kind in kinds)
        lines.append(f"| `{name}` | {row['steps']:,} | {rates} |")
    return "\n".join(lines)


def read(path: str) -> Any:
    """A committed result file; None where there is none yet."""
    file = ROOT / path
    return read_json(file, "restore it, or make it again as the docs tell", finite=False) if file.exists() else None


def tables() -> dict[str, dict[str, str]]:
    """Page -> mark in it -> table."""
    policies = read("recipes/msd/results/policies.json")
    compared = read("results/comparison/results.json")
    clips, clips_trained = (read(f"recipes/events/results/{name}.json") for name in ("results", "trained"))
    return {
        "README.md": {
            "verify": verify_table(read("results/verify.json")["rows"]),
            "floors": (ROOT / "results/floors.md").read_text(encoding="utf-8"),
            "bench": report.markdown(read("results/val/results.json")),
        },
        "docs/modality_verification.md": {"policies": policies_table(policies)} if policies else {},
        "docs/events.md": {
            "trained": trained_table(clips_trained, EVENT_KINDS),
            "clips": report.markdown(clips, ("all",)),
        }
        if clips
        else {},
        "docs/comparison.md": {
            "trained": trained_table(read("recipes/msd/results/trained.json"), KINDS),
            **({"comparison": report.markdown(compared, ("all",))} if compared else {}),
        },
    }


def main() -> int:
    """0 when all pages agree with the files (after writing them, unless `--check`)."""
    stale = 0
    for name, made in tables().items():
        page = ROOT / name
        text = fresh = page.read_text(encoding="utf-8")
        for mark, table in made.items():
            block = f"<!-- {mark} -->\n{table.strip()}\n<!-- /{mark} -->"
            fresh = re.sub(rf"<!-- {mark} -->(.*?<!-- /{mark} -->)?", lambda _, b=block: b, fresh, count=1, flags=re.S)
        stale += fresh != text
        if "--check" not in sys.argv and fresh != text:
            write_whole(page, fresh)
    return int("--check" in sys.argv and stale > 0)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"tables: {error}")
