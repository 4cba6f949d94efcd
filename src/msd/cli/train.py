"""`msd train`: a draft head for a target, from answers that `msd capture` had it write."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from msd.cli.options import Device, Images, Json, Target, quiet
from msd.errors import UserError
from msd.system.files import check_place

T = TypeVar("T")


def train(
    captured: Annotated[Path, typer.Option("--captured", help="Answers written by 'msd capture'.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the run; an earlier run there goes on.")],
    images: Images = None,
    held_out: Annotated[
        Path | None,
        typer.Option("--held-out", help="Captured answers to measure acceptance on; 'val' lines otherwise."),
    ] = None,
    cuts: Annotated[
        Path | None, typer.Option("--cuts", help="Modality cuts; those beside the captured answers by default.")
    ] = None,
    target: Target = "reference",
    method: Annotated[str, typer.Option("--method", help="'msd', or a rival, trained as published.")] = "msd",
    form: Annotated[str, typer.Option("--form", help="'block' (one pass for all levels) or 'ar'.")] = "block",
    layers: Annotated[
        int | None, typer.Option("--layers", min=1, help="Decoder layers of the trunk; by default 2, for 'ar' 1.")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Length of the run; another number lands there.")] = 4000,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Answers a step.")] = 4,
    lr: Annotated[float, typer.Option("--lr", min=0.0, help="Peak learning rate.")] = 1e-3,
    draft_vocabulary: Annotated[int, typer.Option("--draft-vocabulary", min=2)] = 4096,
    weighting: Annotated[str, typer.Option("--weighting", help="λ: learned, fixed or threshold.")] = "learned",
    off: Annotated[str, typer.Option("--off", help="Parts to leave out, separated by commas.")] = "",
    text_only: Annotated[bool, typer.Option("--text-only", help="Stage 1 only.")] = False,
    start: Annotated[
        Path | None, typer.Option("--start", help="An msd drafter to go on from, with its form, parts and vocabulary.")
    ] = None,
    events: Annotated[
        bool, typer.Option(help="Show the drafter the event recordings that answers have.", show_default=False)
    ] = True,
    precision: Annotated[
        str, typer.Option("--precision", help="Of matrix products in training: float32, bf16 or measure.")
    ] = "measure",
    remember: Annotated[
        float,
        typer.Option("--remember", min=0.0, help="Gigabytes to remember the target's states in, for later passes."),
    ] = 1.2,
    seed: Annotated[int, typer.Option("--seed")] = 0,
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
    from msd.labels.label_thresholds import ModalityCuts
    from msd.train.captured import cuts_path, mixed, read_captured

    check_place(out, folder=True)
    out_of = [name.strip() for name in off.split(",") if name.strip()]
    answers = read_captured(captured, images)
    training = [a for a in answers if a.split == "train"]
    testing = read_captured(held_out, images) if held_out else [a for a in answers if a.split != "train"]
    if not training:
        raise UserError(f'\'{captured}\' has no answers of the train part; capture some without "split": "val"')
    if not testing:
        testing, training = _split(training)
    frozen = cuts or cuts_path(captured)
    if not frozen.exists():
        raise UserError(
            f"no modality cuts at '{frozen}'; 'msd capture' fits them on all lines, or name them with --cuts"
        )
    edges = ModalityCuts.load(frozen)
    quiet()
    from msd.drafters import registry
    from msd.drafters.toolkit import checkpoint
    from msd.loading import load_target
    from msd.targets.fingerprint import fingerprint
    from msd.train import curves, drafting
    from msd.train import held_out as scores
    from msd.train.losses.msd import LossConfig

    kind = registry.trainable(method)
    wrong = sorted(set(out_of) - set(kind.parts))
    if wrong and kind.parts:
        raise UserError(f"--off '{wrong[0]}' is no part of the drafter; known: {', '.join(kind.parts)}")
    if calibrate and not kind.routes:
        raise UserError(f"--calibrate is for msd's router; method '{method}' has none")
    settings = drafting.DraftTraining(
        method=method, start=None if start is None else str(start), form=form, layers=layers, steps=steps, batch=batch,
        lr=lr, draft_vocabulary=draft_vocabulary, seed=seed, off=tuple(out_of), text_only=text_only,
        precision=precision, remember=remember, events=events,
        loss=LossConfig(weighting=weighting),
    )  # fmt: skip
    model, processor = load_target(target, device)
    edges.check_target(fingerprint(model))
    sink = curves.tensorboard(out / "tensorboard") if tensorboard else None
    with contextlib.redirect_stdout(sys.stderr):
        finished = drafting.train(model, processor, training, testing, edges, out, settings, sink)
    log, picture = out / "log.jsonl", out / "curves.png"
    if log.exists():  # a run stopped in its first steps has none yet
        curves.draw(log, picture)
    told = checkpoint.training(out / "drafter")
    if finished and calibrate:
        network = registry.load(out / "drafter")
        prompts = [(a.images, a.prompt) for a in mixed(testing, calibrate)]
        masses = scores.record(model, processor, type(network).drafter(network), prompts)
        told |= {"thresholds": scores.solve(masses), "calibrated_on": {k: len(v) for k, v in masses.items()}}
        checkpoint.save_training(out / "drafter", told)
    summary = {
        "drafter": str(out / "drafter"), "finished": finished, "curves": str(picture) if log.exists() else None,
        **{name: told[name] for name in ("steps", "seconds", "peak_gigabytes", "losses", "held_out")},
    }  # fmt: skip
    if as_json:
        print(json.dumps(summary))
        return
    print(f"{summary['drafter']}: step {told['steps']} of {steps}, held-out acceptance {told['held_out']}")
    print("finished" if finished else "stopped; run the same command to go on")


def _split(answers: list[T]) -> tuple[list[T], list[T]]:
    """(held out, train): every twentieth answer is held out."""
    return answers[::20], [a for i, a in enumerate(answers) if i % 20]
