"""Trains the shipped drafter further, with the target's outputs on disk: `python -m recipes.msd.long --steps 2600`.

The first visit to a batch runs the target and stores its outputs, for this run, a resumed one and the race. An
interrupted run resumes when the command is run again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from msd.drafters.algorithms.msd import SHIPPED
from msd.train.drafting import DraftTraining, train
from recipes.msd.rows import training_inputs
from recipes.race.outputs import begun

START = Path("src/msd/weights") / SHIPPED
RATE = 2e-4  # a third of the rate from which the drafter came: at 6e-4, 500 steps cost 0.07 of its acceptance
TEXT = 0.25  # of the steps: the share of texts among the answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--start", type=Path, default=START)
    parser.add_argument("--captured", type=Path, default=Path("runs/msd/captured.jsonl"))
    parser.add_argument("--held-out", type=Path, default=Path("runs/msd/val_captured.jsonl"))
    parser.add_argument("--held-out-limit", type=int, default=120)
    parser.add_argument("--images", type=Path, default=Path("../shared/data"))
    parser.add_argument("--target", default="reference")
    parser.add_argument("--outputs", type=Path, default=Path("runs/race/outputs"))
    parser.add_argument("--out", type=Path, default=Path("runs/msd/longer"))
    args = parser.parse_args()
    model, processor, answers, held_out, thresholds = training_inputs(args)
    cache = begun(model, answers, thresholds, args.outputs)
    settings = DraftTraining(start=str(args.start), steps=args.steps, lr=RATE, text_share=TEXT)
    try:
        finished = train(model, processor, answers, held_out, thresholds, args.out, settings, cache=cache)
    finally:
        cache.save()
    print("finished" if finished else "stopped; run again to resume")


if __name__ == "__main__":
    main()
