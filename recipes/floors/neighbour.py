"""Measures decoding with and without a busy process and `share_cores()`: `python -m recipes.floors.neighbour results`.

The default method describes the bundled photos with and without `share_cores()`, on an idle machine and next to one
process that computes all the time. The four settings take turns.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

import msd
from msd.reference import sample_photos
from msd.system import machine

PROMPT = "Describe the image in detail."


@contextmanager
def neighbour(busy: bool) -> Iterator[None]:
    """Runs a process that computes all the time inside the block, if `busy`."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        time.sleep(0.2)
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()


def answers(vlm: msd.SpeculativeVLM, photos: list[Path]) -> tuple[int, float, list[list[int]], list[float]]:
    """Answers all photos once. Returns (tokens, seconds, the tokens of each answer, τ of each answer)."""
    results = [vlm.generate(p, PROMPT, max_new_tokens=96, do_sample=False) for p in photos]
    return (
        sum(len(r.tokens) for r in results), sum(r.seconds for r in results), [r.tokens for r in results],
        [r.statistics.mean_acceptance_length for r in results],
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--photos", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    vlm = msd.SpeculativeVLM.from_pretrained("reference")
    photos = sample_photos()[: args.photos]
    answers(vlm, photos[:1])
    measured: dict[tuple[bool, bool], list[tuple[int, float, list[list[int]], list[float]]]] = {}
    for _ in range(args.rounds):
        for share in (False, True):
            for busy in (False, True):
                msd.share_cores(share)
                with neighbour(busy):
                    vlm.target.vision.clear()
                    measured.setdefault((share, busy), []).append(answers(vlm, photos))
    first = measured[False, False][0][2]
    rows: list[dict[str, Any]] = [
        {
            "share_cores": share, "busy_neighbour": busy,
            "tokens_per_second": sum(t for t, *_ in rounds) / sum(s for _, s, *_ in rounds),
            "by_round": [t / s for t, s, *_ in rounds],
            "tau": median(tau for *_, taus in rounds for tau in taus),
            "identical": all(tokens == first for _, _, tokens, _ in rounds),
        }
        for (share, busy), rounds in measured.items()
    ]  # fmt: skip
    found = {"cpu": machine.processor(), "threads": torch.get_num_threads(), "torch": torch.__version__, "rows": rows}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "neighbour.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        print({k: v for k, v in row.items() if k != "by_round"})


if __name__ == "__main__":
    main()
