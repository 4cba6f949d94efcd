"""Measures the trained drafters of the race in one state, and copies them to `weights/`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from msd import drafters
from msd.bench import measure, report
from msd.bench.data import load_data
from msd.drafters import Drafter, registry
from msd.drafters.algorithms.msd import MSD, SHIPPED
from msd.drafters.algorithms.msd.config import shapes_of
from msd.drafters.toolkit import checkpoint
from msd.drafters.toolkit.drafter import TrainedDrafter
from msd.errors import UserError
from msd.loading import load_target
from msd.system.files import exclusive, make_folder
from msd.train.capture import mixed, read_captured
from recipes.race.plan import CONTESTS, RACE, TIME, WITH_EVENTS, Run, drafter_folder, plan, step_times
from recipes.race.prompts import CALIBRATING, write_prompts

EQUAL_TIME = "msd:30min"  # the shipped `msd` is trained longer


class EventsHidden(MSD):
    """Drafts without the event recordings that it was trained with."""

    def share_vision_tower(self, encode: Any) -> None:
        """Does nothing: no recording is read."""


def finished(args: argparse.Namespace, state: str) -> dict[str, tuple[Run, Path]]:
    """Returns name -> (run, folder of its drafter in `state`) for the finished runs."""
    contest = CONTESTS[args.contest]
    runs = plan(step_times(contest), args.only, contest, args.minutes)
    done = {
        name: (run, drafter_folder(args.out, name, run, state))
        for name, run in runs.items()
        if run.finished(args.out, name)
    }
    if not done:
        raise UserError(f"no run in '{args.out}' is finished; train one with `python -m recipes.race train`")
    return done


def register(done: Mapping[str, tuple[Run, Path]]) -> dict[str, str]:
    """Registers the drafters as methods under the names of their runs; returns name -> hash of the weights.

    The first drafter with events is also registered as one from which they are hidden.
    """
    digests = {}

    def add(name: str, folder: Path, kind: Callable[..., Drafter]) -> None:
        drafters.register(name, lambda: kind(registry.load(folder), name))
        digests[name] = checkpoint.digest(folder)

    for name, (run, folder) in done.items():
        add(name, folder, MSD if run.settings.method == SHIPPED else TrainedDrafter)
        if run.method == WITH_EVENTS and run.settings.seed == 0:
            add(f"{name}, hidden", folder, EventsHidden)
    return digests


def bench_runs(args: argparse.Namespace) -> None:
    """Measures all finished runs in one state, in one run that can be interrupted; writes the report.

    Without acceptance by modality, which takes as long again; the records of training have it (`tell`).
    """
    done = finished(args, args.state)
    digests = register(done)
    lookups = [f"{name}+prompt-lookup" for name, (run, _) in done.items() if args.lookups and not run.settings.seed]
    measure_in_turn(args, (*digests, *lookups), {"state": args.state, "drafters": digests}, args.results / args.state)


def measure_in_turn(args: argparse.Namespace, methods: tuple[str, ...], about: dict[str, Any], folder: Path) -> None:
    """Measures registered methods on the prompts of `args`, in one run that can be interrupted; writes the report."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.prompts == RACE.data.prompts and not args.prompts.exists():
        held_out = mixed(read_captured(args.held_out, args.images), CALIBRATING)
        write_prompts(args.prompts, args.images, held_out)
    model, processor = load_target(args.target)
    samples = load_data(args.prompts, args.images)[: args.limit]
    settings = measure.BenchSettings(methods, args.max_new_tokens, baselines=(measure.TRANSFORMERS,), about=about)
    make_folder(folder)
    with exclusive(folder):
        work = measure.Bench(model, processor, samples, settings, folder)
        work.measure(lambda text: print(text, end="\r", flush=True))
        results = work.results()
        assert results is not None  # there is at least one sample
        report.write(results, folder)
        work.unfinished.remove()
    print(report.markdown(results))


def ship_runs(args: argparse.Namespace) -> None:
    """Copies the drafters of equal time and seed 0 to `weights/METHOD`, that of `msd` as `msd:30min`; prints sizes.

    Runs under another name than a method's are not copied. Raises UserError for another contest than the race.
    """
    if args.contest != RACE.name:
        raise UserError(f"the drafters of --contest {args.contest} are not shipped; leave it out")
    names = {method.name: method.name for method in registry.catalogue()} | {SHIPPED: EQUAL_TIME}
    for name, (run, folder) in finished(args, TIME).items():
        if run.method not in names or run.settings.seed or run.settings.text_only:
            continue
        network = registry.load(folder)
        if run.settings.method == SHIPPED:
            network.config = replace(network.config, shapes=shapes_of())
        place = args.weights / names[run.method].replace(":", "-")
        checkpoint.save(network, place, checkpoint.training(folder), args.eight_bit)
        print(f"{name}: {place}, {(place / checkpoint.WEIGHTS).stat().st_size / 1e6:.1f} MB")
