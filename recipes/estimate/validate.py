"""Compares estimated with measured pass times: `python -m recipes.estimate.validate --out results/estimate.json`.

Run it on an idle machine. It probes the machine's speed, measures passes of the reference model (or another target)
over chains of 1 to 65 nodes after 64 and 512 tokens, and prefills of several lengths, and compares them with the
estimate. Probe and measurement alternate, and medians are compared, because the speed of a shared machine varies. The
exit code is 1 if any error is above the limit.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from msd.estimate import card, pass_seconds
from msd.estimate.roofline import prefill_seconds
from msd.estimate.sizes import of_config
from msd.loading import load_target
from msd.planning import costs
from msd.system.files import write_whole
from msd.targets import Target, adapt

PROMPTS = (64, 128, 256)
TIMES = 5
MEASURED = ("bandwidth", "flops", "step", "attention", "touch")  # of a card, by the probe


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="reference")
    parser.add_argument("--out", type=Path, default=Path("results/estimate.json"))
    parser.add_argument("--limit", type=float, default=0.25, help="largest relative error of a pass")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    model, _ = load_target(args.target)
    target = adapt(model)
    sizes = of_config(args.target, model.config)
    cards, curves, prefills = [], [], []
    for turn in range(args.rounds):
        cards.append(card("cpu"))
        curves.append(costs.measure(target))
        prefills.append([_prefill(target, n) for n in PROMPTS])
        print(f"round {turn + 1} of {args.rounds}", file=sys.stderr)
    device = replace(cards[0], **{name: median(getattr(c, name) for c in cards) for name in MEASURED})
    curve = curves[0]
    rows = [
        _row("pass", nodes, context, median(c.seconds[i][j] for c in curves),
             pass_seconds(sizes, device, nodes, context))
        for i, context in enumerate(curve.contexts)
        for j, nodes in enumerate(curve.nodes)
    ]  # fmt: skip
    rows += [
        _row("prefill", n, 0, median(times), prefill_seconds(sizes, device, n, 0))
        for n, times in zip(PROMPTS, zip(*prefills, strict=True), strict=True)
    ]
    worst = max(row["error"] for row in rows)
    found = {
        "target": sizes.as_dict(), "card": asdict(device), "backend": target.backend.name, "dtype": str(model.dtype),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "load_before": os.getloadavg()[0],
        "rounds": args.rounds, "limit": args.limit, "worst_error": worst, "passed": worst <= args.limit, "rows": rows,
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(args.out, json.dumps(found, indent=1) + "\n")
    for row in rows:
        print("{kind:8} {rows:4} rows after {context:4}: {measured_ms:7.1f} ms, estimated {estimated_ms:7.1f}, "
              "error {error:.0%}".format(**row))  # fmt: skip
    print(f"worst error {worst:.0%} of at most {args.limit:.0%}")
    return int(worst > args.limit)


def _row(kind: str, rows: int, context: int, measured: float, estimated: float) -> dict[str, Any]:
    error = abs(estimated - measured) / measured
    times = {"measured_ms": 1000 * measured, "estimated_ms": 1000 * estimated}
    return {"kind": kind, "rows": rows, "context": context, **times, "error": error}


@torch.inference_mode()
def _prefill(target: Target, length: int) -> float:
    """Measures the seconds of a text prefill of `length` tokens."""
    ids = costs.arbitrary_tokens(length, target)[None]
    times = []
    for _ in range(TIMES + 1):
        start = time.perf_counter()
        target.prefill(ids, {}, length + 1)
        times.append(time.perf_counter() - start)
    return median(times[1:])


if __name__ == "__main__":
    sys.exit(main())
