"""Trains the runs of a contest, one after another, and measures the seconds of a step of each method."""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from msd.errors import UserError
from msd.labels.label_thresholds import ModalityThresholds
from msd.loading import load_target
from msd.system import machine
from msd.system.files import make_folder, write_whole
from msd.train.capture import Captured, label_thresholds_path, mixed, read_captured
from msd.train.drafting import DraftTraining, train
from msd.train.loop import LoopConfig
from recipes.race.outputs import stored
from recipes.race.plan import CONTESTS, PRECISION, folder_of, plan, roots_of, step_times

ROUNDS = 4  # of measuring step times
PROBE = 40  # steps for measuring the speed of a method
LOGGED = LoopConfig(PROBE).log_every


def train_runs(args: argparse.Namespace) -> None:
    """Trains the unfinished runs. A stopped one (SystemExit) is resumed by the same command."""
    contest = CONTESTS[args.contest]
    runs = plan(step_times(contest), args.only, contest, args.minutes)
    waiting = [name for name, run in runs.items() if not run.finished(args.out, name)]
    if not waiting:
        return
    run = _trainer(args)
    for name in waiting:
        settings = runs[name].settings
        print(f"{name}: {settings.steps} steps, {runs[name].minutes:.1f} minutes of one core", flush=True)
        if not run(folder_of(args.out, name), settings):
            raise SystemExit("stopped; run again to resume")


def measure_steps(args: argparse.Namespace) -> None:
    """Measures the seconds of a step of each method, and replaces the file of step times. The machine must be idle.

    All methods take turns, `ROUNDS` times, because the speed of a machine drifts; the figure is the median. With
    `--only`, those methods take turns with the contest's anchor, and get its stored seconds times what they took in its
    steps; so the lengths of the other runs stay as they are.
    """
    contest = CONTESTS[args.contest]
    for name in args.only:
        if name not in contest.methods:
            raise UserError(f"--only '{name}' is no method of it; choose from {', '.join(contest.methods)}")
    anchor = contest.anchor
    methods = {name: s for name, s in contest.methods.items() if not args.only or name in (*args.only, anchor)}
    changed = [name for name in args.only if name != anchor]
    before = step_times(contest, changed=changed) if args.only else {"seconds": {}, "range": {}}
    if args.only and before["precision"] != PRECISION:
        raise UserError(f"the stored step times are for {before['precision']}; leave out --only")
    run = _trainer(argparse.Namespace(**{**vars(args), "held_out_limit": 4}))  # held-out answers are not timed
    times: dict[str, list[float]] = {method: [] for method in methods}
    for number in range(ROUNDS):
        for method, settings in methods.items():
            times[method] += speed(run, args.out / "probe", replace(settings, precision=PRECISION))
            print(f"round {number + 1} of {ROUNDS}: {method} {times[method]}", flush=True)
    if args.only:
        factor = before["seconds"][anchor] / statistics.median(times.pop(anchor))
        times = {method: [factor * seconds for seconds in values] for method, values in times.items()}
    document = {
        "cpu": machine.processor(),
        "threads": torch.get_num_threads(),
        "precision": PRECISION,
        "roots": {name: roots_of(settings) for name, settings in contest.methods.items()},
        "seconds": before["seconds"] | {name: round(statistics.median(values), 4) for name, values in times.items()},
        "range": before["range"] | {name: [round(min(v), 4), round(max(v), 4)] for name, v in times.items()},
    }
    make_folder(contest.step_times.parent)
    write_whole(contest.step_times, json.dumps(document, indent=1) + "\n")
    print(json.dumps(document, indent=1))


def _trainer(args: argparse.Namespace) -> Callable[..., bool]:
    """Returns `train` for a folder and settings: with the answers, and with the target's outputs for them."""
    torch.set_num_threads(args.threads or 1)
    model, processor, captured, held_out, thresholds = training_inputs(args)
    cache: Any = stored(model, processor, captured, thresholds, args.root)
    return partial(train, model, processor, captured, held_out, thresholds, cache=cache)


def training_inputs(args: argparse.Namespace) -> tuple[Any, Any, list[Captured], list[Captured], ModalityThresholds]:
    """Returns the first arguments of `train`: model, processor, train answers, held-out answers, label thresholds."""
    answers = [a for a in read_captured(args.captured, args.images) if a.split == "train"]
    thresholds = ModalityThresholds.load(label_thresholds_path(args.captured))
    held_out = mixed(read_captured(args.held_out, args.images), args.held_out_limit)
    model, processor = load_target(args.target)
    model.requires_grad_(False)
    return model, processor, answers, held_out, thresholds


def speed(run: Callable[..., bool], probe: Path, settings: DraftTraining) -> list[float]:
    """Measures the core seconds of a training step on answers about images: a mean over each ten steps after ten."""
    stages = replace(settings.stages, text=0, rise=1)
    times: list[float] = []
    shutil.rmtree(probe, ignore_errors=True)
    settings = replace(settings, steps=PROBE, stages=stages, evaluate_every=10**6, keep_at=())
    run(probe, settings, sink=lambda row: times.append(time.process_time()) if "steps" in row else None)
    shutil.rmtree(probe)
    return [(end - begun) / LOGGED for begun, end in pairwise(times)]
