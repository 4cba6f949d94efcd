"""Fits the node chances of trained drafters again, on captured answers of their target, without training."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from msd.drafters import registry
from msd.drafters.toolkit import checkpoint
from msd.drafters.toolkit.network import DraftNetwork
from msd.errors import UserError
from msd.labels.label_thresholds import ModalityThresholds
from msd.targets import Target, adapt
from msd.targets.taps import output_layer
from msd.train.capture import Captured, mixed
from msd.train.held_out import HeldOutAcceptance
from msd.train.teacher_batches import TeacherBatches, TeacherCache

SHARED = 4.0  # gigabytes of the target's outputs that several networks read


def recalibrate(
    networks: Sequence[DraftNetwork],
    model: Any,
    processor: Any,
    answers: Sequence[Captured],
    thresholds: ModalityThresholds,
) -> Iterator[dict[str, Any]]:
    """Fits the `calibration` of networks on greedy answers of the target `model`; yields each fit's part of the record.

    The networks must not have been trained on the answers. Only the answers about images count, if there are any. The
    target reads the answers once for all networks whose last tap is the same layer.
    """
    readers: dict[int, tuple[Target, TeacherCache]] = {}
    layers: dict[int, set[int]] = defaultdict(set)
    for network in networks:
        network.attach(model).to(model.device)
        layers[network.config.taps[-1]].update(network.config.taps)
    for network in networks:
        ids, taps = network.ids, network.config.taps
        if taps[-1] not in readers:
            read = (*sorted(layers[taps[-1]] - {taps[-1]}), taps[-1])
            gigabytes = SHARED if len(networks) > 1 else 0.0
            readers[taps[-1]] = adapt(model, read), TeacherCache(output_layer(model), ids, read, gigabytes)
        target, cache = readers[taps[-1]]
        batches = TeacherBatches(target, processor, answers, thresholds, cache.view(ids, taps), 4)
        yield HeldOutAcceptance(network.objective().to(model.device), batches, answers).calibrate()


def recalibrate_folders(
    folders: Sequence[Path],
    model: Any,
    processor: Any,
    answers: Sequence[Captured],
    thresholds: ModalityThresholds,
    limit: int | None = None,
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Does `recalibrate` for the drafters in `folders` and stores each fit there; yields (folder, fit).

    limit: number of answers, of all tasks in turn. UserError for a folder without a network that `msd train` trains;
    then nothing has been stored.
    """
    networks = [registry.load(folder) for folder in folders]
    for folder, network in zip(folders, networks, strict=True):
        if not isinstance(network, DraftNetwork):
            raise UserError(f"drafter '{folder}' has no node chances to fit; it scores nodes by its own probabilities")
    usable = [a for a in answers if len(a.ids) > 1]
    chosen = mixed([a for a in usable if a.images] or usable, limit)
    for folder, fit in zip(folders, recalibrate(networks, model, processor, chosen, thresholds), strict=True):
        checkpoint.save_training(folder, checkpoint.training(folder) | fit)
        yield folder, fit
