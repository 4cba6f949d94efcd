"""Counts what the target accepts of a head that reads at image positions what vLLM or SGLang gives it there.

    python -m recipes.scale.conventions --drafter weights/eagle3 --captured FILE --images DIR --out FILE

The acceptance is that of `msd train`: chains below every token of held-out answers about images (`count_chain`).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from msd import formats
from msd.loading import load_target
from msd.system.files import write_whole
from msd.targets import adapt
from msd.targets.taps import output_layer
from msd.train.capture import Captured, load_label_thresholds, read_captured
from msd.train.teacher_batches import TeacherBatches, TeacherCache


def counts(net: Any, batches: TeacherBatches, answers: list[Captured]) -> dict[str, list[int]]:
    """Counts [accepted, drafted] tokens per modality."""
    found: dict[str, list[int]] = {}
    objective = net.objective().eval()
    for batch, labels in batches.in_order(answers):
        for name, pair in objective.acceptance(batch, labels).items():
            found[name] = [a + b for a, b in zip(found.get(name, [0, 0]), pair, strict=True)]
    return found


def measure(target: str, drafter: Path, captured: Path, images: Path | None, limit: int | None) -> dict[str, Any]:
    """Returns the counts of a head as it is, and as each engine would run it."""
    model, processor = load_target(target)
    answers = [a for a in read_captured(captured, images) if a.images and len(a.ids) > 1][:limit]
    net: Any = formats.load(drafter).attach(model)
    own, cache = net.config, TeacherCache(output_layer(model), net.ids, net.config.taps, 2.0, torch.float32)
    batches = TeacherBatches(
        adapt(model, own.taps), processor, answers, load_label_thresholds(captured, None), cache, 4
    )  # fmt: skip
    found: dict[str, Any] = {"target": target, "drafter": net.method, "answers": len(answers), "counts": {}}
    for name in ("own", *formats.ENGINES):
        seen = own.variant if name == "own" else formats.ENGINES[name].seen(own.variant)
        net.config = replace(own, variant=seen)
        found["counts"][name] = counts(net, batches, answers)
    return found


def main() -> None:
    """Writes the counts as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="reference")
    parser.add_argument("--drafter", type=Path, required=True)
    parser.add_argument("--captured", type=Path, required=True)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    found = measure(args.target, args.drafter, args.captured, args.images, args.limit)
    write_whole(args.out, json.dumps(found, indent=1) + "\n")
    print(json.dumps(found["counts"]))


if __name__ == "__main__":
    main()
