"""Trains the runs of the race, one after another, and measures the seconds of a step of each method."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from msd.backends.packed import multiplies_in_bf16
from msd.drafters.toolkit import checkpoint
from msd.errors import UserError
from msd.system import machine
from msd.system.files import write_whole
from msd.train.drafting import train
from recipes.msd.rows import folder_of, speed, training_inputs
from recipes.race.outputs import stored
from recipes.race.plan import METHODS, REMEDY, STEP_TIMES, TIME, drafter_folder, plan, step_times

PRECISION = "bf16" if multiplies_in_bf16() else "float32"
ROUNDS = 4  # of measuring step times
ANCHOR = "eagle3"  # the method whose stored step time new ones are relative to


def train_runs(args: argparse.Namespace) -> None:
    """Trains the unfinished runs. A stopped one (SystemExit) is resumed by the same command.

    Raises UserError if the step times have a precision that this CPU only emulates.
    """
    times = step_times()
    if times["precision"] != PRECISION == "float32":
        raise UserError(f"the step times are for {times['precision']}, which this CPU only emulates; {REMEDY}")
    runs = plan(args.minutes, times, args.only)
    waiting = [
        name
        for name, run in runs.items()
        if not checkpoint.training(drafter_folder(args.out, name, run, TIME)).get("finished")
    ]
    if not waiting:
        return
    run = _trainer(args)
    for name in waiting:
        settings = runs[name].settings
        print(f"{name}: {settings.steps} steps, {runs[name].minutes:.1f} minutes of one core", flush=True)
        if not run(folder_of(args.out, name), settings):
            raise SystemExit("stopped; run again to resume")


def measure_steps(args: argparse.Namespace) -> None:
    """Measures the seconds of a step of each method, and replaces `step_times.json`. The machine must be idle.

    All methods take turns, `ROUNDS` times, because the speed of a machine drifts; the figure is the median. With
    `--only`, those methods take turns with `ANCHOR`, and get its stored seconds times what they took in its steps; so
    the lengths of the other runs stay as they are.
    """
    for name in args.only:
        if name not in METHODS:
            raise UserError(f"--only '{name}' is no method of the race; choose from {', '.join(METHODS)}")
    methods = {name: METHODS[name] for name in METHODS if not args.only or name in (*args.only, ANCHOR)}
    before = step_times() if args.only else {"seconds": {}, "range": {}}
    if args.only and (before["roots"], before["precision"]) != (args.roots, PRECISION):
        raise UserError(
            f"the stored step times have {before['roots']} roots in {before['precision']}; leave out --only"
        )
    run = _trainer(argparse.Namespace(**{**vars(args), "held_out_limit": 4}))  # held-out answers are not timed
    times: dict[str, list[float]] = {method: [] for method in methods}
    for number in range(ROUNDS):
        for method, settings in methods.items():
            times[method] += speed(run, args.out / "probe", replace(settings, anchors=args.roots, precision=PRECISION))
            print(f"round {number + 1} of {ROUNDS}: {method} {times[method]}", flush=True)
    if args.only:
        factor = before["seconds"][ANCHOR] / statistics.median(times.pop(ANCHOR))
        times = {method: [factor * seconds for seconds in values] for method, values in times.items()}
    document = {
        "cpu": machine.processor(),
        "threads": args.threads,
        "precision": PRECISION,
        "roots": args.roots,
        "seconds": before["seconds"] | {name: round(statistics.median(values), 4) for name, values in times.items()},
        "range": before["range"] | {name: [round(min(v), 4), round(max(v), 4)] for name, v in times.items()},
    }
    write_whole(STEP_TIMES, json.dumps(document, indent=1) + "\n")
    print(json.dumps(document, indent=1))


def _trainer(args: argparse.Namespace) -> Callable[..., bool]:
    """Returns `train` for a folder and settings: with the answers, and with the target's outputs for them."""
    torch.set_num_threads(args.threads)
    model, processor, captured, held_out, thresholds = training_inputs(args)
    cache: Any = stored(model, processor, captured, thresholds, args.root)
    return partial(train, model, processor, captured, held_out, thresholds, cache=cache)
