"""`msd train`: a draft head for a target, from answers that `msd capture` had it write."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from msd.cli.options import Device, Images, Json, Target, grouped, quiet
from msd.errors import UserError
from msd.system.files import check_place

if TYPE_CHECKING:
    from msd.labels.label_thresholds import ModalityThresholds
    from msd.train.capture import Captured
    from msd.train.drafting import DraftTraining

T = TypeVar("T")


@dataclass(frozen=True)
class Answers:
    """What is learnt from, and measured on."""

    captured: Annotated[Path, typer.Option("--captured", help="Answers written by 'msd capture'.")]
    out: Annotated[Path, typer.Option("--out", help="Folder of the run; an earlier run there goes on.")]
    images: Images = None
    held_out: Annotated[
        Path | None,
        typer.Option("--held-out", help="Captured answers to measure acceptance on; 'val' lines otherwise."),
    ] = None
    thresholds: Annotated[
        Path | None, typer.Option("--cuts", help="Label thresholds; those beside the captured answers by default.")
    ] = None

    def read(self) -> tuple[list[Captured], list[Captured]]:
        """(train, held out); UserError where there are none to learn from."""
        from msd.train.capture import read_captured

        answers = read_captured(self.captured, self.images)
        training = [a for a in answers if a.split == "train"]
        testing = (
            read_captured(self.held_out, self.images) if self.held_out else [a for a in answers if a.split != "train"]
        )
        if not training:
            raise UserError(
                f'\'{self.captured}\' has no answers of the train part; capture some without "split": "val"'
            )
        if not testing:
            testing, training = _split(training)
        return training, testing

    def edges(self) -> ModalityThresholds:
        """The label thresholds of the target that wrote the answers; UserError where there are none."""
        from msd.labels.label_thresholds import ModalityThresholds
        from msd.train.capture import label_thresholds_path

        frozen = self.thresholds or label_thresholds_path(self.captured)
        if not frozen.exists():
            raise UserError(
                f"no label thresholds at '{frozen}'; 'msd capture' fits them on all lines, or name them with --cuts"
            )
        return ModalityThresholds.load(frozen)


@dataclass(frozen=True)
class Network:
    """What is trained."""

    method: Annotated[str, typer.Option("--method", help="'msd', or a rival, trained as published.")] = "msd"
    form: Annotated[str, typer.Option("--form", help="'block' (one pass for all levels) or 'ar'.")] = "block"
    layers: Annotated[
        int | None, typer.Option("--layers", min=1, help="Decoder layers of the trunk; by default 2, for 'ar' 1.")
    ] = None
    draft_vocabulary: Annotated[int, typer.Option("--draft-vocabulary", min=2)] = 4096
    off: Annotated[str, typer.Option("--off", help="Parts to leave out, separated by commas.")] = ""
    start: Annotated[
        Path | None, typer.Option("--start", help="An msd drafter to go on from, with its form, parts and vocabulary.")
    ] = None
    events: Annotated[
        bool, typer.Option(help="Show the drafter the event recordings that answers have.", show_default=False)
    ] = True

    @property
    def out_of(self) -> tuple[str, ...]:
        """Names of the parts to leave out."""
        return tuple(name.strip() for name in self.off.split(",") if name.strip())


@dataclass(frozen=True)
class Learning:
    """How it is trained."""

    steps: Annotated[int, typer.Option("--steps", min=1, help="Length of the run; another number lands there.")] = 4000
    batch: Annotated[int, typer.Option("--batch", min=1, help="Answers a step.")] = 4
    lr: Annotated[float, typer.Option("--lr", min=0.0, help="Peak learning rate.")] = 1e-3
    weighting: Annotated[str, typer.Option("--weighting", help="λ: learned, fixed or threshold.")] = "learned"
    text_only: Annotated[bool, typer.Option("--text-only", help="Stage 1 only.")] = False
    precision: Annotated[
        str, typer.Option("--precision", help="Of matrix products in training: float32, bf16 or measure.")
    ] = "measure"
    remember: Annotated[
        float,
        typer.Option("--remember", min=0.0, help="Gigabytes to remember the target's states in, for later passes."),
    ] = 1.2
    seed: Annotated[int, typer.Option("--seed")] = 0


@grouped
def train(
    answers: Answers,
    network: Network,
    learning: Learning,
    target: Target = "reference",
    calibrate: Annotated[
        int,
        typer.Option("--calibrate", min=0, help="Held-out prompts to solve the thresholds of 'budget' on at the end."),
    ] = 0,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Also log for TensorBoard, to OUT/tensorboard.")
    ] = False,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Train a drafter for the target; Ctrl-C keeps what is done, and the same command goes on from there."""
    check_place(answers.out, folder=True)
    training, testing = answers.read()
    edges = answers.edges()
    quiet()
    from msd.drafters.toolkit import checkpoint
    from msd.loading import load_target
    from msd.targets.registry import fingerprint
    from msd.train import drafting, loop

    settings = _settings(network, learning, calibrate)
    model, processor = load_target(target, device)
    edges.check_target(fingerprint(model))
    out = answers.out
    sink = loop.tensorboard(out / "tensorboard") if tensorboard else None
    with contextlib.redirect_stdout(sys.stderr):
        finished = drafting.train(model, processor, training, testing, edges, out, settings, sink)
    log, picture = out / "log.jsonl", out / "curves.png"
    if log.exists():  # a run stopped in its first steps has none yet
        loop.draw(log, picture)
    told = checkpoint.training(out / "drafter")
    if finished and calibrate:
        told |= _calibrated(out / "drafter", model, processor, testing, calibrate)
        checkpoint.save_training(out / "drafter", told)
    summary = {
        "drafter": str(out / "drafter"), "finished": finished, "curves": str(picture) if log.exists() else None,
        **{name: told[name] for name in ("steps", "seconds", "peak_gigabytes", "losses", "held_out")},
    }  # fmt: skip
    if as_json:
        print(json.dumps(summary))
        return
    print(f"{summary['drafter']}: step {told['steps']} of {learning.steps}, held-out acceptance {told['held_out']}")
    print("finished" if finished else "stopped; run the same command to go on")


def _settings(network: Network, learning: Learning, calibrate: int) -> DraftTraining:
    """The settings of the run; UserError for what the method has not got."""
    from msd.drafters import registry
    from msd.train.drafting import DraftTraining
    from msd.train.losses.msd import LossConfig

    kind = registry.trainable(network.method)
    wrong = sorted(set(network.out_of) - set(kind.parts))
    if wrong and kind.parts:
        raise UserError(f"--off '{wrong[0]}' is no part of the drafter; known: {', '.join(kind.parts)}")
    if calibrate and not kind.routes:
        raise UserError(f"--calibrate is for msd's router; method '{network.method}' has none")
    return DraftTraining(
        method=network.method, start=None if network.start is None else str(network.start), form=network.form,
        layers=network.layers, steps=learning.steps, batch=learning.batch, lr=learning.lr,
        draft_vocabulary=network.draft_vocabulary, seed=learning.seed, off=network.out_of, text_only=learning.text_only,
        precision=learning.precision, remember=learning.remember, events=network.events,
        loss=LossConfig(weighting=learning.weighting),
    )  # fmt: skip


def _calibrated(folder: Path, model: Any, processor: Any, testing: list[Captured], prompts: int) -> dict[str, Any]:
    """The thresholds of `budget` for the drafter in `folder`, from some of the held-out prompts."""
    from msd.drafters import registry
    from msd.train import held_out
    from msd.train.capture import mixed

    network = registry.load(folder)
    asked = [(a.images, a.prompt) for a in mixed(testing, prompts)]
    masses = held_out.record(model, processor, type(network).drafter(network), asked)
    return {"thresholds": held_out.solve(masses), "calibrated_on": {k: len(v) for k, v in masses.items()}}


def _split(answers: list[T]) -> tuple[list[T], list[T]]:
    """(held out, train): every twentieth answer is held out."""
    return answers[::20], [a for i, a in enumerate(answers) if i % 20]
