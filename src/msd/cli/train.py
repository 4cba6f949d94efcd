"""`msd train`: trains a drafter for a target, on answers that `msd capture` wrote."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from msd.cli.options import Device, Images, Json, LabelThresholds, Target, grouped, quiet
from msd.errors import UserError
from msd.system.files import check_place

if TYPE_CHECKING:
    from msd.labels.label_thresholds import ModalityThresholds
    from msd.train.capture import Captured
    from msd.train.drafting import DraftTraining

PARTS = "router,experts,subtrees,vision,transfer,dynamic,readout,motion"  # a copy: the network is not imported for help


@dataclass(frozen=True)
class Answers:
    """Training data, held-out data, and where the run is saved."""

    captured: Annotated[
        list[Path], typer.Option("--captured", help="Answers written by 'msd capture'; repeat it for several files.")
    ]
    out: Annotated[Path, typer.Option("--out", help="Folder of the run; an earlier run there is resumed.")]
    images: Images = None
    held_out: Annotated[
        Path | None,
        typer.Option("--held-out", help="Captured answers to measure acceptance on; 'val' lines by default."),
    ] = None
    thresholds: LabelThresholds = None

    def read(self) -> tuple[list[Captured], list[Captured]]:
        """Returns (training, held-out) answers; without held-out ones, every twentieth training answer is held out.

        Raises UserError if there are no training answers.
        """
        from msd.train.capture import read_captured

        answers = [answer for path in self.captured for answer in read_captured(path, self.images)]
        training = [a for a in answers if a.split == "train"]
        testing = (
            read_captured(self.held_out, self.images) if self.held_out else [a for a in answers if a.split != "train"]
        )
        if not training:
            names = ", ".join(f"'{path}'" for path in self.captured)
            splits = ", ".join(sorted({f"'{a.split}'" for a in answers}))
            raise UserError(f"{names}: no training answers; the \"split\" of their lines is {splits}, not 'train'")
        if not testing:
            testing, training = training[::20], [a for i, a in enumerate(training) if i % 20]
        return training, testing

    def label_thresholds(self) -> ModalityThresholds:
        """Loads the label thresholds, by default those of the first file. Raises UserError if there are none."""
        from msd.train.capture import load_label_thresholds

        return load_label_thresholds(self.captured[0], self.thresholds)


@dataclass(frozen=True)
class Network:
    """The method and the size of its network."""

    method: Annotated[str, typer.Option("--method", help="'msd', or a published method.")] = "msd"
    form: Annotated[
        str, typer.Option("--form", help="'block' (one pass for all levels) or 'ar' (one pass per level).")
    ] = "block"
    layers: Annotated[
        int | None, typer.Option("--layers", min=1, help="Decoder layers of the trunk; by default the method's own.")
    ] = None
    draft_vocabulary: Annotated[
        int | None,
        typer.Option(
            "--draft-vocabulary",
            min=2,
            help="Size of the vocabulary of a method that has its own; 4096 by default.",
        ),
    ] = None
    parts: Annotated[
        str | None,
        typer.Option("--parts", help=f"Of msd: {PARTS}; or 'all' or 'none'. By default router,subtrees,dynamic."),
    ] = None
    start: Annotated[
        Path | None,
        typer.Option(
            "--start",
            help="Folder or hub id of a head to start from, ours or published, or 'mtp' for the layers that the target "
            "brings; it fixes method, form and vocabulary.",
        ),
    ] = None
    engine: Annotated[
        str | None,
        typer.Option(
            "--for", help="vllm or sglang, which is to serve the head ('eagle3' or 'dflash'); see 'msd export'."
        ),
    ] = None
    events: Annotated[
        bool, typer.Option(help="Give the drafter the event recordings of the answers.", show_default=False)
    ] = True


@dataclass(frozen=True)
class Training:
    """Settings of the optimisation."""

    steps: Annotated[
        int, typer.Option("--steps", min=1, help="Length of the run; a resumed run may get another length.")
    ] = 4000
    batch: Annotated[int, typer.Option("--batch", min=1, help="Answers per step.")] = 4
    anchors: Annotated[
        int | None,
        typer.Option("--roots", min=1, help="Positions of an answer that a step drafts from; by default the method's."),
    ] = None
    lr: Annotated[float, typer.Option("--lr", min=0.0, help="Peak learning rate.")] = 1e-3
    weighting: Annotated[
        str, typer.Option("--weighting", help="λ: learned, fixed, threshold or none, which accepts more.")
    ] = "none"
    text_only: Annotated[bool, typer.Option("--text-only", help="Stage 1 only.")] = False
    text_share: Annotated[
        float | None,
        typer.Option(
            "--text-share",
            min=0.0,
            max=1.0,
            help="Of the steps, on text-only answers once images are in; by default the method's, mostly 0.05.",
        ),
    ] = None
    precision: Annotated[
        str, typer.Option("--precision", help="Of matrix products in training: float32, bf16 or measure.")
    ] = "measure"
    remember: Annotated[
        float,
        typer.Option("--remember", min=0.0, help="Gigabytes of memory for cached target outputs."),
    ] = 1.2
    seed: Annotated[int, typer.Option("--seed")] = 0


@grouped
def train(
    answers: Answers,
    network: Network,
    training: Training,
    target: Target = "reference",
    calibrate: Annotated[
        int,
        typer.Option("--calibrate", min=0, help="Held-out prompts to fit the thresholds of 'budget' on at the end."),
    ] = 0,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Also log for TensorBoard, to OUT/tensorboard.")
    ] = False,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Train a drafter for the target. Ctrl-C saves the run; the same command resumes it."""
    check_place(answers.out, folder=True)
    captured, held_out = answers.read()
    thresholds = answers.label_thresholds()
    quiet()
    from msd.drafters.toolkit import processes
    from msd.targets.registry import fingerprint
    from msd.train import drafting, launched, loop, split_target
    from msd.train.held_out import fitted_thresholds

    settings = _settings(network, training, calibrate)
    out = answers.out
    sink = loop.tensorboard(out / "tensorboard") if tensorboard else None
    with launched.ending_together():
        model, processor = split_target.load(target, device, training.batch)
        thresholds.check_target(fingerprint(model))
        if calibrate and split_target.is_split(model):
            raise UserError("--calibrate answers prompts with a whole target, which FSDP splits; leave it out")
        with contextlib.redirect_stdout(sys.stderr):
            finished = drafting.train(model, processor, captured, held_out, thresholds, out, settings, sink)
        if processes.place()[0] == 0:
            fit = partial(fitted_thresholds, out / "drafter", model, processor, held_out, calibrate)
            _report(out, finished, training.steps, fit if finished and calibrate else None, as_json)


def _report(out: Path, finished: bool, steps: int, fit: Callable[[], dict[str, Any]] | None, as_json: bool) -> None:
    """Draws the curves of the run in `out`, adds what `fit` returns to its record, and prints a summary."""
    from msd.drafters.toolkit import checkpoint
    from msd.train import loop

    log, picture = out / "log.jsonl", out / "curves.png"
    if log.exists():  # a run that was stopped in its first steps has no log yet
        loop.draw(log, picture)
    record = checkpoint.training(out / "drafter")
    if fit is not None:
        record |= fit()
        checkpoint.save_training(out / "drafter", record)
    summary = {
        "drafter": str(out / "drafter"), "finished": finished, "curves": str(picture) if log.exists() else None,
        **{name: record[name] for name in ("steps", "seconds", "peak_gigabytes", "losses", "held_out")},
    }  # fmt: skip
    if as_json:
        print(json.dumps(summary))
        return
    print(f"{summary['drafter']}: step {record['steps']} of {steps}, held-out acceptance {record['held_out']}")
    print("finished" if finished else "stopped; run the same command to resume")


def _settings(network: Network, training: Training, calibrate: int) -> DraftTraining:
    """Returns the settings of the run. Raises UserError for options that the method does not have."""
    from msd import formats
    from msd.drafters import registry
    from msd.train.drafting import DraftTraining
    from msd.train.losses.msd import LossConfig

    start = None if network.start is None else str(network.start)
    if start is None:
        kind: Any = registry.trainable(network.method)
    else:
        if network.method == registry.DEFAULT:
            native = registry.is_native(start) and not Path(start).exists()
            network = replace(network, method=start if native else formats.method_of(start))
        kind = registry.startable(network.method)
    parts = None if network.parts is None else _parts(network.parts, kind.parts)
    if calibrate and not kind.routes:
        raise UserError(f"--calibrate is for msd's router; method '{network.method}' has none")
    if network.draft_vocabulary is not None and (start is not None or not kind.reduced):
        fixed = "the start drafter fixes it" if start is not None else f"method '{network.method}' drafts all tokens"
        raise UserError(f"--draft-vocabulary has no effect: {fixed}; leave it out")
    options = {name: value for name, value in (asdict(network) | asdict(training)).items() if value is not None}
    loss = LossConfig(weighting=options.pop("weighting"))
    return DraftTraining(**(options | {"start": start, "parts": parts, "loss": loss}))


def _parts(text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the parts that --parts names; UserError for an unknown one."""
    if text in ("all", "none"):
        return known if text == "all" else ()
    parts = tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = sorted(set(parts) - set(known))
    if known and (unknown or not parts):
        raise UserError(
            f"--parts '{(unknown or [text])[0]}' is no part of the drafter; known: {', '.join(known)}, all, none"
        )
    return parts
