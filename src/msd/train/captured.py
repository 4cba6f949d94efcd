"""Captured answers as training reads them, and the modality cuts that their gains give."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor

from msd.bench.data import data_lines, image_folder
from msd.errors import UserError
from msd.labels.label_thresholds import EventCuts, ModalityCuts
from msd.system.files import named_in


class _HasTask(Protocol):
    @property
    def task(self) -> str: ...


T = TypeVar("T", bound=_HasTask)


@dataclass(frozen=True)
class Captured:
    """One answer of the target. ids: all its tokens, the end token included where it came; gain: nats of each.

    events: an event camera's recording of what the images show; costs: [T, 2 + F] nats (see `msd.labels.event_gain`).
    """

    images: tuple[Path, ...]
    prompt: str
    ids: tuple[int, ...]
    gain: tuple[float, ...]
    task: str
    split: str
    events: Path | None = None
    costs: tuple[tuple[float, ...], ...] | None = None

    def labels(self, cuts: ModalityCuts) -> Tensor:
        """Modality ids [T] int64 of its tokens."""
        return cuts.labels(self.gain, self.costs)


def read_captured(path: Path, images: Path | None = None) -> list[Captured]:
    """What `msd capture` wrote. images: the folder given to it as --images; by default as for data lines.

    UserError names the line that is wrong or whose image is missing.
    """
    folder = image_folder(path, images)
    return [_captured(line, where, folder) for where, line in data_lines(path)]


def mixed(answers: Sequence[T], limit: int | None = None) -> list[T]:
    """Up to `limit` answers (or data lines), tasks in turn, so that a part holds all of them in like numbers."""
    by_task: dict[str, list[T]] = {}
    for answer in answers:
        by_task.setdefault(answer.task, []).append(answer)
    turns = [a for group in zip_longest(*by_task.values()) for a in group if a is not None]
    return turns[:limit]


def cuts_path(path: Path) -> Path:
    """Where the cuts of captured answers `path` are kept: beside it, with `.cuts.json` at the end."""
    return path.with_name(path.name + ".cuts.json")


def check_labelled(records: Iterable[dict[str, Any]], path: Path) -> None:
    """UserError unless all records of `path` have the gains that `msd capture` notes."""
    for record in records:
        gain, length = record.get("gain"), len(record["ids"]) + (record.get("end") is not None)
        if not isinstance(gain, list) or not _numbers(gain) or len(gain) != length:
            raise UserError(
                f"'{path}': the answer to {record['prompt']!r:.60} has no gain for each of its tokens; "
                "delete its line, and the same command asks it again"
            )


def fit_cuts(records: Iterable[dict[str, Any]], target: str) -> ModalityCuts | None:
    """Cuts from the records of the train part that have images (the rest is language); None where there are none."""
    shown = [r for r in records if r["split"] == "train" and r["image"]]
    if not shown:
        return None
    cuts = ModalityCuts.fit([r["gain"] for r in shown], target)
    costs = [r["costs"] for r in shown if "costs" in r]
    return cuts.model_copy(update={"events": EventCuts.fit(costs)}) if costs else cuts


def _captured(line: dict[str, Any], where: str, folder: Path) -> Captured:
    kinds = {"image": list, "prompt": str, "ids": list, "gain": list, "task": str, "split": str}
    for name, kind in kinds.items():
        if not isinstance(line.get(name), kind):
            raise UserError(f"{where}: '{name}' is missing or not a {kind.__name__}; write the file with 'msd capture'")
    end = line.get("end")
    ids = (*line["ids"], *(() if end is None else (end,)))
    if not all(isinstance(i, int) and i >= 0 for i in ids):
        raise UserError(f"{where}: 'ids' and 'end' must be token ids; write the file with 'msd capture'")
    if not _numbers(line["gain"]):
        raise UserError(f"{where}: 'gain' must be finite numbers; write the file with 'msd capture'")
    if len(ids) != len(line["gain"]):
        raise UserError(f"{where}: {len(line['gain'])} gains for {len(ids)} answer tokens")
    if not ids:
        raise UserError(f"{where}: the answer has no tokens")
    if not all(isinstance(name, str) for name in line["image"]):
        raise UserError(f"{where}: 'image' must be a list of file names; write the file with 'msd capture'")
    paths = tuple(named_in(folder, name) for name in line["image"])
    for picture in paths:
        if not picture.is_file():
            raise UserError(f"{where}: image '{picture}' does not exist; name the folder of the images")
    found = Captured(paths, line["prompt"], ids, tuple(line["gain"]), line["task"], line["split"])
    if "costs" not in line:
        return found
    if not isinstance(line.get("events"), str) or not isinstance(line["costs"], list):
        raise UserError(f"{where}: 'costs' without 'events', or no list; write the file with 'msd capture'")
    costs, events = line["costs"], named_in(folder, line["events"])
    if not all(isinstance(each, list) and _numbers(each) and len(each) == len(costs[0]) for each in costs):
        raise UserError(f"{where}: 'costs' must be lists of finite numbers; write the file with 'msd capture'")
    if len(costs) != len(ids):
        raise UserError(f"{where}: {len(costs)} costs for {len(ids)} answer tokens")
    if not events.is_file():
        raise UserError(f"{where}: events '{events}' do not exist; name the folder of the images")
    return replace(found, events=events, costs=tuple(map(tuple, costs)))


def _numbers(values: list[Any]) -> bool:
    return all(isinstance(value, int | float) and math.isfinite(value) for value in values)
