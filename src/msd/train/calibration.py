"""Fits the node chances of a trained drafter again, on captured answers of its target, without training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msd.drafters import registry
from msd.drafters.toolkit import checkpoint
from msd.drafters.toolkit.network import DraftNetwork
from msd.errors import UserError
from msd.labels.label_thresholds import ModalityThresholds
from msd.targets import adapt
from msd.targets.taps import output_layer
from msd.train.capture import Captured, mixed
from msd.train.held_out import HeldOutAcceptance
from msd.train.teacher_batches import TeacherBatches, TeacherCache


def recalibrate(
    network: DraftNetwork, model: Any, processor: Any, answers: Sequence[Captured], thresholds: ModalityThresholds
) -> dict[str, Any]:
    """Fits `network.calibration` on greedy answers of the target `model`; returns the fit's part of the record.

    The network must not have been trained on the answers. Only the answers about images count, if there are any.
    """
    network.attach(model).to(model.device)
    head, taps = output_layer(model), network.config.taps
    cache = TeacherCache(head, network.ids, taps, 0.0)
    batches = TeacherBatches(adapt(model, taps), processor, answers, thresholds, cache, 4)
    return HeldOutAcceptance(network.objective().to(model.device), batches, answers).calibrate()


def recalibrate_folder(
    folder: Path,
    model: Any,
    processor: Any,
    answers: Sequence[Captured],
    thresholds: ModalityThresholds,
    limit: int | None = None,
) -> dict[str, Any]:
    """Does `recalibrate` for the drafter in `folder` and stores the fit there; returns it.

    limit: number of answers, of all tasks in turn. UserError for a folder without a network that `msd train` trains.
    """
    network = registry.load(folder)
    if not isinstance(network, DraftNetwork):
        raise UserError(f"drafter '{folder}' has no node chances to fit; it scores nodes by its own probabilities")
    usable = [a for a in answers if len(a.ids) > 1]
    chosen = mixed([a for a in usable if a.images] or usable, limit)
    fit = recalibrate(network, model, processor, chosen, thresholds)
    checkpoint.save_training(folder, checkpoint.training(folder) | fit)
    return fit
