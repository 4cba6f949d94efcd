"""Compares MSD with variants that lack some of its parts and with published methods, all trained for the same time.

python -m recipes.msd.rows train --minutes 15            # two rows at a time; run again to resume
python -m recipes.msd.rows tell                          # held-out acceptance of every row
python -m recipes.msd.rows bench                         # all rows on val prompts, in one run
python -m recipes.msd.rows ship                          # copies rivals and the control to weights/, for `msd bench`

The target's outputs for all answers are computed once, before the first row, and shared by all rows. Rows are trained
two at a time, each on one core; --minutes is the time of that core. A row's number of steps follows from its measured
speed, so a part that makes training slower gets fewer steps. `standard` has the same trunk, vocabulary, time and plan
as `msd`, without any modality part. Rows that differ only in decoding share weights.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from queue import Empty
from typing import Any, ClassVar

import torch
from torch import Tensor

from msd import drafters
from msd.backends.packed import faster_in_bf16
from msd.bench import measure, report
from msd.bench.data import load_data
from msd.core.modality import LANGUAGE
from msd.core.tree import Scores
from msd.drafters import Drafter, registry
from msd.drafters.algorithms.combined import TRUNKS, Combined
from msd.drafters.algorithms.msd import MSD, SWITCHES, MSDNetwork
from msd.drafters.algorithms.msd.config import shapes_of
from msd.drafters.algorithms.prompt_lookup import Repeats
from msd.drafters.toolkit import checkpoint
from msd.drafters.toolkit.drafter import TrainedDrafter
from msd.labels.label_thresholds import ModalityThresholds
from msd.loading import load_target
from msd.model import SpeculativeVLM
from msd.system.files import read_json, write_whole
from msd.targets import State, adapt
from msd.train.capture import Captured, label_thresholds_path, mixed, read_captured
from msd.train.drafting import DraftTraining, initial_network, train
from msd.train.loop import on_signals
from msd.train.losses.msd import LossConfig
from msd.train.teacher_batches import TeacherBatches, TeacherCache
from recipes.race.measuring import EventsHidden
from recipes.race.plan import folder_of, steps_for
from recipes.race.training import speed, training_inputs

FORK = multiprocessing.get_context("fork")
SHIPPED_MEGABYTES = 60  # limit for the rivals' weights
WITH_EVENTS = "msd with events"
PUBLISHED = [m.name for m in registry.catalogue() if m.network is not None and m.name != registry.DEFAULT]
TEXT_ONLY = "text-only"
OWN = {"standard": "standard seed 0", "msd-ar": "msd:ar"}  # shipped name -> row


@dataclass(frozen=True)
class Row:
    """A trained row. decoding: (name, parts) of further rows that decode with its weights and without these parts."""

    settings: DraftTraining
    decoding: tuple[tuple[str, tuple[str, ...]], ...] = ()


def rows(seeds: Sequence[int], events: bool = False) -> dict[str, Row]:
    """Returns name -> row, the most important first. events: the rows for answers with event recordings."""
    own = DraftTraining()
    if events:
        return {
            WITH_EVENTS: Row(own),
            "msd without events": Row(replace(own, events=False)),
            "standard": Row(replace(own, events=False, parts=())),
            TEXT_ONLY: _text_only(own),
        }
    block = replace(own, form="block", parts=SWITCHES)
    found = {}
    for seed in seeds:
        shared = (("one subtree", ("subtrees",)), ("all subtrees always", ("dynamic",))) if seed == seeds[0] else ()
        found[f"msd:block seed {seed}"] = Row(replace(block, seed=seed), shared)
        found[f"standard seed {seed}"] = Row(replace(block, seed=seed, parts=()))
    found["msd:ar"] = Row(replace(block, form="ar"))
    for name in ("router", "vision", "transfer"):
        found[f"no {name}"] = Row(replace(block, parts=tuple(part for part in SWITCHES if part != name)))
    found["text-only stage"] = Row(replace(block, text_only=True))
    found["fixed λ"] = Row(replace(block, loss=LossConfig(weighting="fixed")))
    for method in PUBLISHED:
        if registry.get(method).weights == (method,):  # others draft with another method's weights
            found[method] = _text_only(block) if method == TEXT_ONLY else Row(replace(block, method=method))
    return found


def _text_only(block: DraftTraining) -> Row:
    """Returns the row of the text-only drafter. It starts as a part of the target, so its learning rate is lower."""
    return Row(replace(block, method=TEXT_ONLY, lr=0.3 * block.lr, layers=2))


def train_rows(args: argparse.Namespace) -> None:
    """Trains the unfinished rows in parallel, each on one core, with one shared cache of the target's outputs."""
    model, processor, answers, held_out, thresholds = training_inputs(args)
    by_name = rows(range(args.seeds), args.events)
    waiting = [
        name
        for name in args.only or by_name
        if not checkpoint.training(folder_of(args.out, name) / "drafter").get("finished")
    ]
    if not waiting:
        return
    networks = [initial_network(adapt(model), answers, by_name[name].settings) for name in waiting]
    layers = sorted({layer for network in networks for layer in network.config.taps})
    cache = TeacherCache(model.get_output_embeddings(), networks[0].ids, layers, args.remember)
    del networks
    seconds = fill_cache(model, processor, answers, thresholds, cache)
    print(f"target outputs for {len(answers)} answers: {seconds:.0f} s", flush=True)
    run = partial(train, model, processor, answers, held_out, thresholds, cache=cache)
    queue = FORK.Queue()
    for name in waiting:
        queue.put(name)
    if not _in_parallel(args.side_by_side, partial(_train_waiting, queue, by_name, run, args)):
        print("stopped; run again to resume")


def _in_parallel(count: int, work: Callable[[], None]) -> bool:
    """Calls `work` in `count` forked processes, which share this one's memory. Returns whether all succeeded."""
    workers = [FORK.Process(target=work) for _ in range(count)]
    for worker in workers:
        worker.start()
    with on_signals(lambda *_: [worker.terminate() for worker in workers]):
        for worker in workers:
            worker.join()
    return all(worker.exitcode == 0 for worker in workers)


def _train_waiting(queue: Any, by_name: dict[str, Row], run: Callable[..., bool], args: argparse.Namespace) -> None:
    """Trains the queued rows one after another. Exits with code 1 if a run was stopped."""
    torch.set_num_threads(1)  # one core per row; threads also do not survive a fork
    while True:
        try:
            name = queue.get(timeout=1)
        except Empty:
            return
        folder, settings = folder_of(args.out, name), by_name[name].settings
        plan = folder / "plan.json"
        if not plan.exists():
            seconds = statistics.median(speed(run, folder / "probe", settings))
            plan.parent.mkdir(parents=True, exist_ok=True)
            write_whole(plan, json.dumps({"steps": steps_for(args.minutes, seconds), "seconds_per_step": seconds}))
        steps = read_json(plan, "delete it: the row's speed is measured again")["steps"]
        print(f"{name}: {steps} steps", flush=True)
        stages = replace(settings.stages, text=steps // 50, rise=steps // 10)
        if not run(folder, replace(settings, steps=steps, stages=stages, evaluate_every=max(50, steps // 8))):
            raise SystemExit(1)


def fill_cache(
    model: Any, processor: Any, answers: Sequence[Captured], thresholds: ModalityThresholds, cache: TeacherCache
) -> float:
    """Computes the target's outputs for all answers, as far as the cache has room. Returns the seconds it took."""
    dtype = torch.bfloat16 if faster_in_bf16(model.device) else None
    teacher = adapt(model, cache.layers)
    batches = TeacherBatches(teacher, processor, answers, thresholds, cache, DraftTraining().batch, dtype=dtype)
    begun = time.monotonic()
    batches.fill_cache(lambda done, total: print(f"batch {done} of {total}", end="\r", flush=True))
    return time.monotonic() - begun


def variant(folder: Path, off: Sequence[str]) -> MSDNetwork:
    """Loads a trained network and switches some of its parts off."""
    network: MSDNetwork = registry.load(folder)
    network.config = replace(network.config, **dict.fromkeys(off, False))
    return network


class WrongImage(MSD):
    """Drafts with the wrong image: that of the first request to any instance. The target sees the right one.

    The target's states at text positions are those of the right image too.
    """

    other: ClassVar[Tensor | None] = None

    def begin(self, state: State, scores: Scores) -> None:
        """Replaces the target's states at image positions."""
        assert scores.taps is not None
        shown = state.layout.modality[0, : scores.taps.shape[1]] != LANGUAGE.id
        if WrongImage.other is None:
            WrongImage.other = scores.taps[:, shown].clone()
        if WrongImage.other.shape == scores.taps[:, shown].shape:
            taps = scores.taps.clone()
            taps[:, shown] = WrongImage.other
            scores = replace(scores, taps=taps)
        super().begin(state, scores)


def register_rows(args: argparse.Namespace) -> list[str]:
    """Registers the trained rows and their variants as methods. Returns the names of all methods to measure."""
    by_name = rows(range(args.seeds), args.events)
    methods = ["prompt-lookup"] if args.events else []

    def register(name: str, make: Callable[[], Drafter]) -> None:
        drafters.register(name, make)
        methods.append(name)

    for name, row in by_name.items():
        folder = folder_of(args.out, name) / "drafter"
        if not (folder / "model.safetensors").exists():
            continue
        load = partial(registry.load, folder)
        if name == WITH_EVENTS:  # two controls: without the recordings, and with repeats of the prompt
            register("events hidden", lambda load=load: EventsHidden(load(), "events hidden"))  # type: ignore[misc]
            register("msd with events, repeats", lambda load=load: Repeats(MSD(load())))  # type: ignore[misc]
        elif name == next(iter(by_name)):
            register("wrong image", lambda load=load: WrongImage(load(), "wrong image"))  # type: ignore[misc]
        if row.settings.method == "msd":
            for shown, off in ((name, ()), *row.decoding):
                register(shown, lambda f=folder, o=off, n=shown: MSD(variant(f, o), n))  # type: ignore[misc]
            continue
        register(name, lambda load=load: TrainedDrafter(load()))  # type: ignore[misc]
        router = folder_of(args.out, "msd:block seed 0") / "drafter"
        if name in TRUNKS and router.exists():
            register(f"msd+{name}", lambda load=load, r=router: Combined(load(), registry.load(r)))  # type: ignore[misc]
        for other in (registry.get(m) for m in PUBLISHED):
            if other.weights == (name,) and other.name != name:  # drafts with this row's weights
                register(other.name, lambda load=load, o=other: o.make(load()))  # type: ignore[misc]
    return methods


def bench_rows(args: argparse.Namespace) -> None:
    """Measures all rows on val prompts and writes the report."""
    methods = register_rows(args)
    model, processor = load_target(args.target)
    samples = load_data(args.prompts, args.images)
    if args.at_least:
        lengths = {(a.images, a.prompt): len(a.ids) for a in read_captured(args.held_out, args.images)}
        samples = [s for s in samples if lengths.get((s.images, s.prompt), 0) >= args.at_least]
    samples = mixed(samples, args.limit)
    if "wrong image" in methods:  # its image is that of the last sample, which is then left out
        last = next(s for s in reversed(samples) if s.images)
        samples = [s for s in samples if s.images != last.images]
        donor = SpeculativeVLM(model, processor, drafter="wrong image")
        donor.generate(list(last.images), last.prompt, max_new_tokens=2, do_sample=False)
    results = measure.run(
        model,
        processor,
        samples,
        methods,
        args.max_new_tokens,
        0.0,
        lambda text: print(text, end="\r", flush=True),
        ModalityThresholds.load(label_thresholds_path(args.captured)),
        baselines=(measure.TRANSFORMERS,),  # the library's own drafting is measured elsewhere
    )
    report.write(results, args.results)
    print(report.markdown(results))


def report_training(args: argparse.Namespace) -> None:
    """Writes held-out acceptance, steps and time of the finished rows to `trained.json`, and prints a table."""
    records = {}
    for name in rows(range(args.seeds), args.events):
        record = checkpoint.training(folder_of(args.out, name) / "drafter")
        if record.get("finished"):
            records[name] = {key: record[key] for key in ("steps", "seconds", "peak_gigabytes", "held_out")}
    write_whole(args.results / "trained.json", json.dumps(records, indent=1, ensure_ascii=False) + "\n")
    print("| row | steps | acceptance | vision | language | fusion |\n|---|---|---|---|---|---|")
    for name, record in records.items():
        rates = [record["held_out"].get(kind, 0.0) for kind in ("acceptance", "vision", "language", "fusion")]
        print(f"| {name} | {record['steps']:,} | " + " | ".join(f"{rate:.3f}" for rate in rates) + " |")


def ship_rows(args: argparse.Namespace) -> None:
    """Copies the rivals' weights and those of MSD's own forms (`OWN`), and prints their sizes."""
    sources = {m: folder_of(args.out, m) / "drafter" for m in PUBLISHED}
    sources |= {name: folder_of(args.out, row) / "drafter" for name, row in OWN.items()}
    for name, source in sources.items():
        if (source / "model.safetensors").exists():
            network = registry.load(source)
            if name in OWN:
                network.config = replace(network.config, shapes=shapes_of())
            checkpoint.save(network, args.weights / name, checkpoint.training(source), args.eight_bit)
    sizes = {f.parent.name: f.stat().st_size / 1e6 for f in args.weights.glob("*/model.safetensors")}
    print("\n".join(f"{name}: {size:.1f} MB" for name, size in sorted(sizes.items())))
    total = sum(size for name, size in sizes.items() if name not in OWN)
    print(f"rivals: {total:.1f} MB of at most {SHIPPED_MEGABYTES} MB")
    if total > SHIPPED_MEGABYTES:
        raise SystemExit("the weights are too large for the repository; --eight-bit halves them")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "tell", "bench", "ship"))
    parser.add_argument("--captured", type=Path, default=Path("runs/msd/captured.jsonl"))
    parser.add_argument("--held-out", type=Path, default=Path("runs/msd/val_captured.jsonl"))
    parser.add_argument("--held-out-limit", type=int, default=60)
    parser.add_argument("--images", type=Path, default=Path("../shared/data"))
    parser.add_argument("--prompts", type=Path, default=Path("runs/msd/val.jsonl"), help="data lines for the benchmark")
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--at-least", type=int, help="only prompts whose captured answer has so many tokens")
    parser.add_argument("--out", type=Path, default=Path("runs/msd/rows"))
    parser.add_argument("--results", type=Path, default=Path("recipes/msd/results"))
    parser.add_argument("--weights", type=Path, default=Path("weights"), help="destination of `ship`")
    parser.add_argument("--eight-bit", action="store_true", help="shipped weights in 8 bits instead of 16")
    parser.add_argument("--target", default="reference")
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--remember", type=float, default=4.0, help="gigabytes for cached target outputs")
    parser.add_argument("--side-by-side", type=int, default=2, help="rows trained at the same time, each on one core")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--events", action="store_true", help="the rows of the events suite (recipes/events)")
    parser.add_argument("--only", nargs="*", help="names of rows, in the order in which to train them")
    args = parser.parse_args()
    {"train": train_rows, "tell": report_training, "bench": bench_rows, "ship": ship_rows}[args.what](args)


if __name__ == "__main__":
    main()
