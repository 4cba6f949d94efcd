"""Trains a drafter for hours: `python -m recipes.msd.long`, or `--method eagle3` for the best rival.

`msd` has its default form, parts and loss, a rival those of the race; roots and learning rate are the race's. 15% of
the steps are on texts. To the race's answers come those about other photos and texts, half of them sampled (T = 1). An
interrupted run resumes when the command is run again; with another `--steps`, an unfinished run decays from its current
rate to the new end.

`python -m recipes.msd.long bench` measures both, with and without lookups of long repeats, on the race's prompts:
results/long.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from msd import drafters
from msd.drafters import Drafter, registry
from msd.drafters.algorithms.msd import MSD, SHIPPED
from msd.drafters.toolkit import checkpoint
from msd.drafters.toolkit.drafter import TrainedDrafter
from msd.train.capture import read_captured
from msd.train.drafting import DraftTraining, train
from msd.train.held_out import fitted_thresholds
from recipes.race.measuring import measure_in_turn
from recipes.race.outputs import begun
from recipes.race.plan import PRECISION, RACE, folder_of
from recipes.race.prompts import CALIBRATING
from recipes.race.training import training_inputs

METHODS = {**RACE.methods, SHIPPED: DraftTraining()}
MORE = [Path("runs/msd/more_captured.jsonl"), Path("runs/msd/sampled_captured.jsonl")]
TEXT = 0.15  # of the steps: the share of texts among the answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("train", "bench"), default="train")
    parser.add_argument("--method", choices=list(METHODS), default=SHIPPED)
    parser.add_argument("--steps", type=int, default=16_000)
    parser.add_argument("--evaluate-every", type=int, default=4000, help="steps; on held-out answers, a minute each")
    parser.add_argument("--captured", type=Path, default=Path("runs/msd/captured.jsonl"))
    parser.add_argument("--more", type=Path, nargs="*", default=MORE, help="further files of captured answers")
    parser.add_argument("--held-out", type=Path, default=Path("runs/msd/val_captured.jsonl"))
    parser.add_argument("--held-out-limit", type=int, default=CALIBRATING)
    parser.add_argument("--images", type=Path, default=Path("../shared/data"))
    parser.add_argument("--target", default="reference")
    parser.add_argument("--outputs", type=Path, default=Path("runs/race/outputs"), help="of the target, on disk")
    parser.add_argument("--out", type=Path, help="by default runs/msd/long-METHOD")
    parser.add_argument("--threads", type=int, help="by default one to train, all to `bench`")
    parser.add_argument("--results", type=Path, default=Path("results/long"))
    parser.add_argument("--limit", type=int, help="of the prompts of `bench`")
    parser.set_defaults(prompts=RACE.data.prompts, max_new_tokens=RACE.data.max_new_tokens)
    args = parser.parse_args()
    (bench_finished if args.what == "bench" else train_one)(args)


def bench_finished(args: argparse.Namespace) -> None:
    """Measures the drafters of all methods of which there is a long run, the shipped method against each."""
    folders = {name: place(name) / "drafter" for name in METHODS if checkpoint.is_whole(place(name) / "drafter")}
    digests = {}
    for name, folder in folders.items():
        kind = MSD if name == SHIPPED else TrainedDrafter
        drafters.register(f"{name} long", partial(_made, kind, folder, f"{name} long"))
        digests[f"{name} long"] = checkpoint.digest(folder)
    lookups = tuple(f"{name}+prompt-lookup" for name in digests)
    measure_in_turn(args, (*digests, *lookups), {"drafters": digests}, args.results)


def _made(kind: Callable[..., Drafter], folder: Path, name: str) -> Drafter:
    return kind(registry.load(folder), name)


def place(method: str) -> Path:
    """Returns the folder of a method's run."""
    return folder_of(Path("runs/msd"), f"long-{method}")


def train_one(args: argparse.Namespace) -> None:
    """Trains a method, or goes on with it."""
    torch.set_num_threads(args.threads or 1)
    model, processor, answers, held_out, thresholds = training_inputs(args)
    answers += [answer for path in args.more for answer in read_captured(path, args.images)]
    cache = begun(model, answers, thresholds, args.outputs)
    settings = replace(
        METHODS[args.method], steps=args.steps, text_share=TEXT, evaluate_every=args.evaluate_every, precision=PRECISION
    )
    out = args.out or place(args.method)
    try:
        finished = train(model, processor, answers, held_out, thresholds, out, settings, cache=cache)
    finally:
        cache.save()
    record = checkpoint.training(out / "drafter")
    if finished and args.method == SHIPPED and "thresholds" not in record:
        fitted = fitted_thresholds(out / "drafter", model, processor, held_out, CALIBRATING)
        checkpoint.save_training(out / "drafter", record | fitted)
    print("finished" if finished else "stopped; run again to resume")


if __name__ == "__main__":
    main()
