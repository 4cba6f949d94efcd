"""Writes the model card of the shipped drafters, from their training records and a benchmark.

python -m recipes.msd.card --weights src/msd/weights --results results/val/results.json
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from safetensors import safe_open

from msd.drafters.toolkit import checkpoint
from msd.system.files import read_json, write_whole

NAMES = ("vision", "language", "fusion")


def described(folder: Path) -> str:
    """Describes one drafter: its form and size, its training, and the held-out measurements."""
    record: dict[str, Any] = checkpoint.training(folder)
    settings, held = record["settings"], record["held_out"]
    with safe_open(folder / "model.safetensors", "pt") as weights:
        parameters = sum(weights.get_tensor(name).numel() for name in weights.keys())  # noqa: SIM118
    size = (folder / "model.safetensors").stat().st_size
    losses, router = record["losses"], record.get("router")
    lines = [
        f"## `{folder.name.replace('-', ':')}`",
        "",
        f"Form `{settings['form']}`, {parameters / 1e6:.1f} million parameters, {size / 1e6:.0f} MB in float16, for "
        f"target `{record['cuts']['target']}`.",
        "",
        f"- Trained on {record['answers']:,} of the target's own answers, in batches of {settings['batch']}: "
        f"{_runs(record)}; peak memory {record['peak_gigabytes']:.1f} GB and "
        f"{losses['answer_tokens_per_second']:.0f} answer tokens per second in the last run.",
        "- Loss at the end (running mean): " + ", ".join(f"{name} {losses[name]:.2f}" for name in NAMES) + "; λ "
        + ", ".join(f"{name} {losses[f'λ_{name}']:.2f}" for name in NAMES) + ".",
        "- Held-out chain acceptance, depth 5: " + ", ".join(f"{name} {held[name]:.3f}" for name in NAMES)
        + f"; all {held['acceptance']:.3f}. On texts without an image {held['text']:.3f}.",
    ]  # fmt: skip
    if router:
        lines.append(
            f"- Router on {router['positions']:,} held-out positions: accuracy {router['accuracy']:.3f} (always the "
            f"most frequent class: {router['majority']:.3f}), expected calibration error {router['ece']:.3f}; accuracy "
            f"below the first level {router['deeper']:.3f}. Confusion, true class by predicted class:"
        )
        table = router["confusion"]
        lines += ["", "  | | " + " | ".join(table) + " |", "  |---" * (len(table) + 1) + "|"]
        lines += [f"  | {a} | " + " | ".join(str(n) for n in row.values()) + " |" for a, row in table.items()]
        lines.append("")
    fit = record["confidence"]
    lines.append(
        f"- Confidence of a node, on {fit['candidates']:,} held-out candidates: expected calibration error "
        f"{fit['ece']:.3f} ({fit['ece_of_q']:.3f} for the draft distribution alone)."
    )
    for epsilon, table in (record.get("thresholds") or {}).items():
        shown = ", ".join(f"{name} {theta:.2f}" for name, theta in table.items())
        lines.append(f"- θ of `budget` at ε = {epsilon}: {shown}.")
    return "\n".join(lines) + "\n"


def _runs(record: dict[str, Any]) -> str:
    """Lists the steps and minutes of every run, the first one first."""
    before = record.get("before")
    own = f"{record['steps']:,} steps in {record['seconds'] / 60:.0f} minutes"
    return f"{_runs(before)}, then {own}" if before else own


def measured(results: dict[str, Any], methods: list[str]) -> str:
    """Formats the benchmark rows of the drafters as a table."""
    head = ["method", "task", "vs `ar`", "95%", "τ", "τ outside repeats", "acceptance, vision / language / fusion"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in results["rows"]:
        if row["method"] in methods:
            rates = row["acceptance_by_modality"] or {}
            low, high = row["speedup_vs_ar_interval"]
            lines.append(
                f"| `{row['method']}` | {row['task']} ({row['samples']}) | {row['speedup_vs_ar']:.2f} | "
                f"{low:.2f}–{high:.2f} | {row['mean_acceptance_length']:.2f} | "
                f"{row['tau_outside_repeated_8grams'] or 0.0:.2f} | "
                + " / ".join("–" if rates.get(n) is None else f"{rates[n]:.3f}" for n in NAMES) + " |"
            )  # fmt: skip
    return "\n".join(lines) + "\n"


INTRODUCTION = """# Draft heads for the reference model

Trained with [`recipes/msd`](../../../recipes/msd/README.md) on the reference model's own answers about train photos of
Flickr8k and COCO (the weights contain no images or captions). They draft only for that model; its output is the same
with and without them ([proof](../../../docs/verification.md)). Apache-2.0.
"""

LIMITS = """## Limits

The run began with a schedule of 21,000 steps, shortened to 13,000 at step 1,900 and to 11,000 at step 5,900; pauses are
in its minutes. The curves have not come to rest. Held-out figures are of 60 answers, those about photos except where
texts without an image are named; the calibration error of the router was 0.017 on four times as many with the weights
before.

The drafter has learnt how this small target describes everyday scenes. On text-only prompts and at high temperatures
far fewer drafts are accepted; the plan then drafts less, or not at all.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=Path("src/msd/weights"))
    parser.add_argument("--results", type=Path, default=Path("results/val/results.json"))
    args = parser.parse_args()
    folders = sorted(path.parent for path in args.weights.glob("*/training.json"))
    parts = [INTRODUCTION, *map(described, folders)]
    if args.results.exists():
        results = read_json(args.results, "measure it again with 'msd bench --out'", finite=False)
        methods = [folder.name.replace("-", ":") for folder in folders]
        parts += [f"## Measured\n\n`{args.results}`, val photos, greedy, float32:\n\n{measured(results, methods)}"]
    write_whole(args.weights / "README.md", "\n".join([*parts, LIMITS]))


if __name__ == "__main__":
    main()
