"""The estimate against measured passes: `python recipes/estimate/validate.py --out results/estimate.json`.

On an idle machine: probes it as a card, measures passes of the reference model (or another target) over chains of
1 to 65 nodes after 64 and 512 tokens, and prompts of some lengths, and compares. Exit code 1 where any error of a pass
is above the limit.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch

from msd import costs
from msd.estimate import card, pass_seconds
from msd.estimate.roofline import prefill_seconds
from msd.estimate.sizes import of_config
from msd.loading import load_target
from msd.targets import Target, adapt

PROMPTS = (64, 128, 256)
TIMES = 5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="reference")
    parser.add_argument("--out", type=Path, default=Path("results/estimate.json"))
    parser.add_argument("--limit", type=float, default=0.25, help="largest relative error of a pass")
    args = parser.parse_args()
    model, _ = load_target(args.target)
    target = adapt(model)
    sizes, device = of_config(args.target, model.config), card("cpu")
    measured = costs.measure(target)
    rows = [
        _row("pass", nodes, context, seconds, pass_seconds(sizes, device, nodes, context))
        for context, line in zip(measured.contexts, measured.seconds, strict=True)
        for nodes, seconds in zip(measured.nodes, line, strict=True)
    ]
    rows += [_row("prefill", n, 0, _prefill(target, n), prefill_seconds(sizes, device, n, 0)) for n in PROMPTS]
    worst = max(row["error"] for row in rows)
    found = {
        "target": asdict(sizes), "card": asdict(device), "backend": target.backend.name, "dtype": str(model.dtype),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "load_before": os.getloadavg()[0],
        "limit": args.limit, "worst_error": worst, "passed": worst <= args.limit, "rows": rows,
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n")
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
    """Seconds of a prompt of words."""
    ids = costs.words(length, target)[None]
    times = []
    for _ in range(TIMES + 1):
        start = time.perf_counter()
        target.prefill(ids, {}, length + 1)
        times.append(time.perf_counter() - start)
    return median(times[1:])


if __name__ == "__main__":
    sys.exit(main())
