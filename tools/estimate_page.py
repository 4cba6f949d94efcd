"""Writes the tables of docs/estimate.md: the estimate against published figures and against measured passes.

Published figures are those of the papers; 1 is added to a τ without the bonus token. The estimate is always for an A100
of 80 GB, because not every paper names its card.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from msd.estimate import Acceptance, Sizes, Workload, card, plans, sizes
from msd.system.files import read_json, write_whole

ROOT = Path(__file__).parents[1]
CARD = "A100-80"


@dataclass(frozen=True)
class Published:
    """A published result.

    length: mean acceptance length with the bonus token, None if we found no source. nodes, depth: of the draft tree.
    """

    target: str
    method: str
    length: float | None
    speedup: float
    nodes: int
    depth: int
    source: str


FIGURES = (
    Published("llava-1.5-7b", "MSD as published", 4.75, 2.11, 60, 5, "MMSpec, arXiv 2603.14989"),
    Published("llava-1.5-7b", "ViSpec", 3.98, 2.23, 30, 3, "MMSpec, arXiv 2603.14989"),
    Published("llava-1.5-7b", "EAGLE-2", 1.64, 1.25, 60, 5, "MMSpec, arXiv 2603.14989"),
    Published("llava-1.5-7b", "MSD as published", None, 2.29, 60, 5, "arXiv 2505.14260, its best"),
    Published("llava-1.5-13b", "MSD as published", None, 2.46, 60, 5, "arXiv 2505.14260, its best"),
    Published("qwen2.5-vl-7b", "ViSpec", None, 1.80, 30, 3, "arXiv 2509.15235, mean of its tasks"),
)


RATES = (0.8, 0.7, 0.6, 0.5)  # assumed acceptance of a chain, by level
BROUGHT = (  # target, draft model (None: the target's own layers), name
    ("qwen3.5-4b", None, "Qwen3.5-4B + its multi-token-prediction layer"),
    ("gemma-4-31b", "gemma-4-31b-assistant", "Gemma 4 31B + its assistant"),
    ("qwen3-vl-32b", "qwen3-vl-2b", "Qwen3-VL-32B + Qwen3-VL-2B"),
)


def estimated(model: Sizes, figure: Published, length: float) -> float:
    """Estimates the speedup of a whole answer at batch 1."""
    work = Workload(depth=figure.depth)
    return float(plans(model, card(CARD), Acceptance(lengths={figure.nodes: length}), work, batches=[1])[0]["speedup"])


def needed(model: Sizes, figure: Published) -> float:
    """Returns the acceptance length at which the estimate equals the published speedup."""
    low, high = 1.0, float(figure.nodes)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if estimated(model, figure, middle) < figure.speedup else (low, middle)
    return low


def published() -> str:
    """Returns the table of published figures."""
    lines = [
        "| target | method | published τ | published speedup | estimated speedup at this τ | "
        "τ for the published speedup | source |",
        "|---|---|---|---|---|---|---|",
    ]
    for figure in FIGURES:
        model = sizes(figure.target)
        length = "–" if figure.length is None else f"{figure.length:.2f}"
        bound = "–" if figure.length is None else f"{estimated(model, figure, figure.length):.2f}x"
        lines.append(
            f"| {figure.target} | {figure.method} | {length} | {figure.speedup:.2f}x | {bound} | "
            f"{needed(model, figure):.2f} | {figure.source} |"
        )
    return "\n".join(lines)


def grid() -> str:
    """Returns the speedups of decoding by tree size and batch at τ = 3.5."""
    lines = []
    for name in ("llava-1.5-7b", "llava-1.5-13b", "qwen2.5-vl-7b"):
        rows = plans(sizes(name), card(CARD), Acceptance(length=3.5), Workload())
        batches = list(dict.fromkeys(row["batch"] for row in rows))
        lines += [f"**{name}**", "", "| nodes | " + " | ".join(f"batch {b}" for b in batches) + " |"]
        lines.append("|---" * (len(batches) + 1) + "|")
        for nodes in dict.fromkeys(row["nodes"] for row in rows):
            cells = [f"{r['speedup_decode']:.2f}x" if r["fits"] else "too big" for r in rows if r["nodes"] == nodes]
            lines.append(f"| {nodes} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines).strip()


def brought() -> str:
    """Returns the table of drafters that come with a model, on an H100, for chains of one to four drafts."""
    lines = [
        "| target + drafter | memory, batch 1 and 32 | drafts | τ | plain step | draft | verification | decoding "
        "| batch 8 |",
        "|---" * 9 + "|",
    ]
    for target, helper, name in BROUGHT:
        model = sizes(target)
        for depth in (1, 2, 4):
            work = Workload(depth=depth, drafter="levels" if helper else "mtp", model=sizes(helper) if helper else None)
            one, eight, most = plans(model, card("H100"), Acceptance(rates=RATES), work, [depth], [1, 8, 32])
            memory = f"{one['memory_bytes'] / 1e9:.1f} GB, {most['memory_bytes'] / 1e9:.1f} GB"
            steps = " | ".join(f"{1000 * one[key]:.1f} ms" for key in ("plain_s", "draft_s", "verify_s"))
            gains = " | ".join(f"{row['speedup_decode']:.2f}x" for row in (one, eight))
            lines.append(f"| {name} | {memory} | {depth} | {one['acceptance_length']:.2f} | {steps} | {gains} |")
    return "\n".join(lines)


def checked() -> str:
    """Returns the results of `recipes/estimate/validate.py`."""
    path = ROOT / "results/estimate.json"
    if not path.exists():
        return "Not measured yet: `python -m recipes.estimate.validate --out results/estimate.json` on an idle machine."
    results = read_json(path, "write it again with recipes/estimate/validate.py", finite=False)
    conditions = f"{results['backend']} backend, {results['dtype']}, {results['threads']} threads"
    error = f"largest error {results['worst_error']:.0%} (limit {results['limit']:.0%})"
    lines = [f"{results['target']['name']}, {conditions}: {error}. Cells: measured / estimated ms (error).", ""]
    contexts = sorted({row["context"] for row in results["rows"]})
    lines += ["| pass | " + " | ".join(f"context {c}" for c in contexts) + " |", "|---" * (len(contexts) + 1) + "|"]
    cells = {
        (r["kind"], r["rows"], r["context"]): f"{r['measured_ms']:.1f} / {r['estimated_ms']:.1f} ({r['error']:.0%})"
        for r in results["rows"]
    }
    for kind, rows in dict.fromkeys((kind, rows) for kind, rows, _ in cells):
        line = " | ".join(cells.get((kind, rows, context), "–") for context in contexts)
        lines.append(f"| {kind}, {rows} rows | {line} |")
    return "\n".join(lines)


def main() -> None:
    """Replaces the text between the marks of the page."""
    page = ROOT / "docs/estimate.md"
    text = page.read_text(encoding="utf-8")
    for name, table in {"published": published(), "grid": grid(), "brought": brought(), "checked": checked()}.items():
        block = f"<!-- {name} -->\n{table}\n<!-- /{name} -->"
        text = re.sub(rf"<!-- {name} -->(.*?<!-- /{name} -->)?", lambda _, b=block: b, text, count=1, flags=re.S)
    write_whole(page, text)


if __name__ == "__main__":
    main()
