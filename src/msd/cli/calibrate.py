"""`msd calibrate`: fits the node chances of trained drafters on captured answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from msd.cli.options import Device, Images, Json, LabelThresholds, Target, quiet


def calibrate(
    drafter: Annotated[
        list[Path], typer.Option("--drafter", help="Folder of a drafter; the fit is stored there. Repeatable.")
    ],
    captured: Annotated[
        Path, typer.Option("--captured", help="Answers written by 'msd capture' that it was not trained on.")
    ],
    images: Images = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Use N answers, of all tasks in turn.")] = 200,
    cuts: LabelThresholds = None,
    target: Target = "reference",
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Fit the chances by which drafters choose their drafts, without training them. Answers stay the same."""
    from msd.drafters.toolkit import checkpoint
    from msd.train.capture import load_label_thresholds, read_captured

    for folder in drafter:
        checkpoint.configuration(folder)
    answers, thresholds = read_captured(captured, images), load_label_thresholds(captured, cuts)
    quiet()
    from msd.loading import load_target
    from msd.targets.registry import fingerprint
    from msd.train.calibration import recalibrate_folders

    model, processor = load_target(target, device)
    thresholds.check_target(fingerprint(model))
    for folder, fit in recalibrate_folders(drafter, model, processor, answers, thresholds, limit):
        report = fit["confidence"]
        if as_json:
            print(json.dumps({"drafter": str(folder), **fit}), flush=True)
            continue
        print(
            f"{folder}: {report['candidates']:,} candidates, calibration error {report['ece_of_q']:.3f} of q, "
            f"{report['ece']:.3f} fitted; log loss {report['log_loss_of_q']:.3f} and {report['log_loss']:.3f}",
            flush=True,
        )
