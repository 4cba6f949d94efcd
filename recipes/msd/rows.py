"""The comparison of MSD with its own parts taken out and with rivals: one capture, one budget of time for every row.

python -m recipes.msd.rows train --minutes 15            # two rows at a time; run again to continue
python -m recipes.msd.rows tell                          # what training measured on held-out answers
python -m recipes.msd.rows bench                         # all rows side by side on val prompts, in one run
python -m recipes.msd.rows ship                          # rivals and the control to weights/, for `msd bench`

The target says its word on all answers once, before the first row; every row learns from these notes. Rows are trained
two at a time, each on one core; minutes are that core's, and a row's steps follow from its own measured speed, so a
part that costs training time pays for it. `standard` is the same trunk, vocabulary, budget and plan with every
modality part off. Rows that only differ in decoding share weights.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
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
from msd.drafters import registry
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
from msd.system.machine import use_huge_pages
from msd.targets import State, adapt
from msd.train.capture import Captured, cuts_path, mixed, read_captured
from msd.train.drafting import DraftTraining, train, untrained
from msd.train.loop import signals
from msd.train.losses.msd import LossConfig
from msd.train.teacher_batches import TeacherBatches, TeacherCache

FORK = multiprocessing.get_context("fork")
PROBE = 40  # steps that a row's speed is measured on
SHIPPED_MEGABYTES = 60  # of rivals
WITH_EVENTS = "msd with events"
PUBLISHED = [m.name for m in registry.catalogue() if m.network is not None and m.name != registry.DEFAULT]
TEXT_ONLY = "text-only"
OWN = {"standard": "standard seed 0", "msd-15min": "msd:block seed 0", "msd-ar": "msd:ar"}  # shipped name -> row


@dataclass(frozen=True)
class Row:
    """A trained row. `decoding`: switches put out only when it drafts, by name of the row they give."""

    settings: DraftTraining
    decoding: tuple[tuple[str, tuple[str, ...]], ...] = ()


def rows(seeds: Sequence[int], events: bool = False) -> dict[str, Row]:
    """Name -> row, the most wanted first. events: those of answers about scenes with event recordings."""
    block = DraftTraining()
    if events:
        return {
            WITH_EVENTS: Row(block),
            "msd without events": Row(replace(block, events=False)),
            "standard": Row(replace(block, events=False, off=SWITCHES)),
            TEXT_ONLY: _text_only(block),
        }
    found = {}
    for seed in seeds:
        shared = (("one subtree", ("subtrees",)), ("all subtrees always", ("dynamic",))) if seed == seeds[0] else ()
        found[f"msd:block seed {seed}"] = Row(replace(block, seed=seed), shared)
        found[f"standard seed {seed}"] = Row(replace(block, seed=seed, off=SWITCHES))
    found["msd:ar"] = Row(replace(block, form="ar"))
    for name in ("router", "vision", "transfer"):
        found[f"no {name}"] = Row(replace(block, off=(name,)))
    found["text-only stage"] = Row(replace(block, text_only=True))
    found["fixed λ"] = Row(replace(block, loss=LossConfig(weighting="fixed")))
    for method in PUBLISHED:
        if registry.get(method).weights == (method,):  # others draft with another method's weights
            found[method] = _text_only(block) if method == TEXT_ONLY else Row(replace(block, method=method))
    return found


def _text_only(block: DraftTraining) -> Row:
    """It begins as a part of the target, which a high rate undoes."""
    return Row(replace(block, method=TEXT_ONLY, lr=0.3 * block.lr, layers=2))


def folder_of(out: Path, name: str) -> Path:
    """Where a row is trained."""
    return out / name.replace(" ", "_").replace(":", "_")


def steps_for(minutes: float, seconds: float) -> int:
    """Steps of `seconds` each that fill `minutes`, to the nearest ten."""
    return max(10, round(minutes * 60 / seconds / 10) * 10)


def train_rows(args: argparse.Namespace) -> None:
    """Rows that learn from the same notes are trained side by side, each on one core, from what is read once."""
    answers = [a for a in read_captured(args.captured, args.images) if a.split == "train"]
    cuts = ModalityThresholds.load(cuts_path(args.captured))
    held_out = mixed(read_captured(args.held_out, args.images), args.held_out_limit)
    model, processor = load_target(args.target)
    model.requires_grad_(False)
    every = rows(range(args.seeds), args.events)
    waiting = [
        name
        for name in args.only or every
        if not checkpoint.training(folder_of(args.out, name) / "drafter").get("finished")
    ]
    if not waiting:
        return
    networks = [untrained(adapt(model), answers, every[name].settings) for name in waiting]
    layers = sorted({layer for network in networks for layer in network.config.taps})
    notes = TeacherCache(model.get_output_embeddings(), networks[0].ids, layers, args.remember)
    del networks
    seconds = read_notes(model, processor, answers, cuts, notes)
    print(f"the target's word on {len(answers)} answers: {seconds:.0f} s", flush=True)
    run = partial(train, model, processor, answers, held_out, cuts, notes=notes)
    queue = FORK.Queue()
    for name in waiting:
        queue.put(name)
    if not _side_by_side(args.side_by_side, partial(_train_waiting, queue, every, run, args)):
        print("stopped; run again to continue")


def _side_by_side(count: int, work: Callable[[], None]) -> bool:
    """Does the work in `count` processes that share this one's memory; whether all came to its end."""
    workers = [FORK.Process(target=work) for _ in range(count)]
    for worker in workers:
        worker.start()
    with signals(lambda *_: [worker.terminate() for worker in workers]):
        for worker in workers:
            worker.join()
    return all(worker.exitcode == 0 for worker in workers)


def _train_waiting(queue: Any, every: dict[str, Row], run: Callable[..., bool], args: argparse.Namespace) -> None:
    """Trains one waiting row after another; ends the process with 1 where one was stopped."""
    torch.set_num_threads(1)  # also because threads do not survive a fork
    while True:
        try:
            name = queue.get(timeout=1)
        except Empty:
            return
        folder, settings = folder_of(args.out, name), every[name].settings
        plan = folder / "plan.json"
        if not plan.exists():
            speed = _speed(run, folder / "probe", settings)
            plan.parent.mkdir(parents=True, exist_ok=True)
            write_whole(plan, json.dumps({"steps": steps_for(args.minutes, speed), "seconds_per_step": speed}))
        steps = read_json(plan, "delete it: the row's speed is measured anew")["steps"]
        print(f"{name}: {steps} steps", flush=True)
        stages = replace(settings.stages, text=steps // 50, rise=steps // 10)
        if not run(folder, replace(settings, steps=steps, stages=stages, evaluate_every=max(50, steps // 8))):
            raise SystemExit(1)


def read_notes(
    model: Any, processor: Any, answers: Sequence[Captured], cuts: ModalityThresholds, notes: TeacherCache
) -> float:
    """Has the target say its word on all answers, as far as the notes have room; the seconds that took."""
    dtype = torch.bfloat16 if faster_in_bf16(model.device) else None
    teacher = adapt(model, notes.layers)
    teacher_batches = TeacherBatches(teacher, processor, answers, cuts, notes, DraftTraining().batch, dtype=dtype)
    begun = time.monotonic()
    teacher_batches.read_ahead(lambda done, total: print(f"batch {done} of {total}", end="\r", flush=True))
    return time.monotonic() - begun


def _speed(run: Callable[[Path, DraftTraining], bool], probe: Path, settings: DraftTraining) -> float:
    """Seconds of one core that a step about images takes, measured on a few after a warm-up."""
    stages = replace(settings.stages, text=0, rise=1)
    times = []
    for steps in (2, 2 + PROBE):
        shutil.rmtree(probe, ignore_errors=True)
        begun = time.process_time()
        run(probe, replace(settings, steps=steps, stages=stages, evaluate_every=10**6))
        times.append(time.process_time() - begun)
    shutil.rmtree(probe)
    return (times[1] - times[0]) / PROBE


def variant(folder: Path, off: Sequence[str]) -> MSDNetwork:
    """A trained network that decodes with some parts off."""
    network: MSDNetwork = registry.load(folder)
    network.config = replace(network.config, **dict.fromkeys(off, False))
    return network


class Hidden(MSD):
    """Drafts without the event recordings that it was trained to see."""

    def share_vision_tower(self, encode: Any) -> None:
        """Ignores it, so that no recording is encoded."""


class WrongImage(MSD):
    """Drafts with another image, that of the first request any of them sees: what its own is worth to the drafter.

    The target sees the right one, and so do its states at text positions.
    """

    other: ClassVar[Tensor | None] = None

    def begin(self, state: State, scores: Scores) -> None:
        """As usual, with other states at the image positions."""
        assert scores.taps is not None
        shown = state.layout.modality[0, : scores.taps.shape[1]] != LANGUAGE.id
        if WrongImage.other is None:
            WrongImage.other = scores.taps[:, shown].clone()
        if WrongImage.other.shape == scores.taps[:, shown].shape:
            taps = scores.taps.clone()
            taps[:, shown] = WrongImage.other
            scores = replace(scores, taps=taps)
        super().begin(state, scores)


def bench_rows(args: argparse.Namespace) -> None:
    every = rows(range(args.seeds), args.events)
    methods = ["prompt-lookup"] if args.events else []
    for name, row in every.items():
        folder = folder_of(args.out, name) / "drafter"
        if not (folder / "model.safetensors").exists():
            continue
        if name == WITH_EVENTS:  # what it lost where the recordings were missing
            drafters.register("events hidden", lambda f=folder: Hidden(registry.load(f), "events hidden"))  # type: ignore[misc]
            drafters.register("msd with events, repeats", lambda f=folder: Repeats(MSD(registry.load(f))))  # type: ignore[misc]
            methods += ["events hidden", "msd with events, repeats"]
        elif name == next(iter(every)):
            drafters.register("wrong image", lambda f=folder: WrongImage(registry.load(f), "wrong image"))  # type: ignore[misc]
            methods.append("wrong image")
        if row.settings.method != "msd":
            drafters.register(name, lambda f=folder: TrainedDrafter(registry.load(f)))  # type: ignore[misc]
            methods.append(name)
            if name in TRUNKS and (router := folder_of(args.out, "msd:block seed 0") / "drafter").exists():
                drafters.register(
                    f"msd+{name}", lambda f=folder, r=router: Combined(registry.load(f), registry.load(r))
                )  # type: ignore[misc]
                methods.append(f"msd+{name}")
            for other in (registry.get(m) for m in PUBLISHED):
                if other.weights == (name,) and other.name != name:  # drafts with this one's weights
                    drafters.register(other.name, lambda f=folder, o=other: o.make(registry.load(f)))  # type: ignore[misc]
                    methods.append(other.name)
            continue
        for shown, off in ((name, ()), *row.decoding):
            drafters.register(shown, lambda f=folder, o=off, n=shown: MSD(variant(f, o), n))  # type: ignore[misc]
            methods.append(shown)
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
    cuts = ModalityThresholds.load(cuts_path(args.captured))
    told = lambda text: print(text, end="\r", flush=True)  # noqa: E731
    results = measure.run(
        model,
        processor,
        samples,
        methods,
        args.max_new_tokens,
        0.0,
        told,
        cuts,
        baselines=(measure.TRANSFORMERS,),  # what the library drafts itself is measured elsewhere
    )
    report.write(results, args.results)
    print(report.markdown(results))


def tell_rows(args: argparse.Namespace) -> None:
    """What training said of the rows: held-out chain acceptance, steps and time, to `trained.json` in the results."""
    told = {}
    for name in rows(range(args.seeds), args.events):
        noted = checkpoint.training(folder_of(args.out, name) / "drafter")
        if noted.get("finished"):
            told[name] = {key: noted[key] for key in ("steps", "seconds", "peak_gigabytes", "held_out")}
    write_whole(args.results / "trained.json", json.dumps(told, indent=1, ensure_ascii=False) + "\n")
    print("| row | steps | acceptance | vision | language | fusion |\n|---|---|---|---|---|---|")
    for name, row in told.items():
        rates = [row["held_out"].get(kind, 0.0) for kind in ("acceptance", "vision", "language", "fusion")]
        print(f"| {name} | {row['steps']:,} | " + " | ".join(f"{rate:.3f}" for rate in rates) + " |")


def ship_rows(args: argparse.Namespace) -> None:
    """Writes the rivals, and first seeds of MSD's own forms (`OWN`), and says how large the rivals are together."""
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
    together = sum(size for name, size in sizes.items() if name not in OWN)
    print(f"rivals together {together:.1f} MB of {SHIPPED_MEGABYTES} MB")
    if together > SHIPPED_MEGABYTES:
        raise SystemExit("that is more than the repository should carry; --eight-bit halves it")


def main() -> None:
    use_huge_pages()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "tell", "bench", "ship"))
    parser.add_argument("--captured", type=Path, default=Path("runs/msd/captured.jsonl"))
    parser.add_argument("--held-out", type=Path, default=Path("runs/msd/val_captured.jsonl"))
    parser.add_argument("--held-out-limit", type=int, default=60)
    parser.add_argument("--images", type=Path, default=Path("../shared/data"))
    parser.add_argument("--prompts", type=Path, default=Path("runs/msd/val.jsonl"), help="what is benchmarked")
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--at-least", type=int, help="prompts whose captured answer has as many tokens, and no others")
    parser.add_argument("--out", type=Path, default=Path("runs/msd/rows"))
    parser.add_argument("--results", type=Path, default=Path("recipes/msd/results"))
    parser.add_argument("--weights", type=Path, default=Path("weights"), help="where `ship` copies them to")
    parser.add_argument("--eight-bit", action="store_true", help="shipped weights in 8 bits instead of 16")
    parser.add_argument("--target", default="reference")
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--remember", type=float, default=4.0, help="gigabytes for the target's word on the answers")
    parser.add_argument("--side-by-side", type=int, default=2, help="rows trained at the same time, each on one core")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--events", action="store_true", help="the rows of the events suite (recipes/events)")
    parser.add_argument("--only", nargs="*", help="names of rows, in the order in which to train them")
    args = parser.parse_args()
    {"train": train_rows, "tell": tell_rows, "bench": bench_rows, "ship": ship_rows}[args.what](args)


if __name__ == "__main__":
    main()
