"""Answers written by a model, for training another on: batched, resumable, each question once."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor

from msd.bench.data import data_lines, image_folder
from msd.errors import UserError
from msd.labels.label_thresholds import EventThresholds, ModalityThresholds
from msd.system.files import append, exclusive, make_folder, named_in

ASKED = {"image": list, "prompt": str, "answer": str, "ids": list}  # fields of a record, and what they hold
ANSWERED = {"finished": bool, "task": str, "split": str}


@dataclass(frozen=True)
class Prompt:
    """A question about zero or more images (paths, as the data names them), that an event camera may have seen too."""

    text: str
    images: tuple[str, ...] = ()
    task: str = ""
    split: str = "train"
    events: str | None = None


@dataclass(frozen=True)
class Answer:
    """What the model wrote: generated ids without the end token, and whether it ended by itself.

    end: the end token, if that ended it. gain: image gain in nats of each token, the end token included; costs: of
    prompts with events, what each token owes to them (`msd.labels.gain`). They are only known to writers that
    label (`TargetWriter`).
    """

    text: str
    ids: tuple[int, ...]
    finished: bool
    end: int | None = None
    gain: tuple[float, ...] | None = None
    costs: tuple[tuple[float, ...], ...] | None = None


class Writer(Protocol):
    """Writes one answer per prompt."""

    def __call__(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """Answers in the order of the prompts."""
        ...


def capture(
    prompts: Iterable[Prompt],
    write: Writer,
    path: Path,
    batch: int = 16,
    report: Callable[[int, int], None] | None = None,
    marks: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Write one jsonl record per distinct (images, text); those already in `path` are kept and not asked again.

    A record is `{"image": [...], "prompt", "answer", "ids", "finished", "task", "split"}`, with "end" and "gain" from a
    writer that labels, and `marks`, such as the model's name. An interrupted run continues where it stopped; a
    half-written last line is dropped. `report(done, total)` is called after each batch. Returns all records that answer
    `prompts`, in the order of `prompts`. UserError when `path` holds anything else, or records with other marks, cannot
    be written, or is being written by another process.
    """
    marks = marks or {}
    make_folder(path.parent)
    with exclusive(path):
        wanted, done = _distinct(prompts), _read_back(path, marks)
        todo = _in_order(wanted, done)
        _end_last_line(path)
        for start in range(0, len(todo), batch):
            group = todo[start : start + batch]
            records = [_record(p, a, marks) for p, a in zip(group, write(group), strict=True)]
            done |= {(p.images, p.text): r for p, r in zip(group, records, strict=True)}
            append(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
            if report:
                report(len(wanted) - len(todo) + start + len(group), len(wanted))
    return [done[p.images, p.text] for p in wanted]


def pending(prompts: Iterable[Prompt], path: Path, marks: Mapping[str, str] | None = None) -> list[Prompt]:
    """The distinct prompts that `capture` would still ask, in its order."""
    return _in_order(_distinct(prompts), _read_back(path, marks or {}))


def _distinct(prompts: Iterable[Prompt]) -> list[Prompt]:
    """The first prompt of each (images, text)."""
    first: dict[tuple[tuple[str, ...], str], Prompt] = {}
    for p in prompts:
        first.setdefault((p.images, p.text), p)
    return list(first.values())


def _in_order(wanted: list[Prompt], done: Mapping[tuple[tuple[str, ...], str], Any]) -> list[Prompt]:
    """What is not done: alike in task, and so in the length of their answers; then each image's prompts together."""
    todo = [p for p in wanted if (p.images, p.text) not in done]
    return sorted(todo, key=lambda p: (len(p.images), p.events is None, p.task, p.images, len(p.text)))


def _record(prompt: Prompt, answer: Answer, marks: Mapping[str, str]) -> dict[str, Any]:
    record: dict[str, Any] = {
        "image": list(prompt.images),
        "prompt": prompt.text,
        "answer": answer.text,
        "ids": list(answer.ids),
        "finished": answer.finished,
        "task": prompt.task,
        "split": prompt.split,
    }
    if answer.gain is not None:
        record |= {"end": answer.end, "gain": list(answer.gain)}
    if answer.costs is not None:
        record |= {"events": prompt.events, "costs": [list(costs) for costs in answer.costs]}
    return record | dict(marks)


def _read_back(path: Path, marks: Mapping[str, str]) -> dict[tuple[tuple[str, ...], str], dict[str, Any]]:
    """Records of an earlier run by (images, text), without a half-written last line."""
    if not path.exists():
        return {}
    if not path.is_file():  # a device, such as /dev/full, has no end
        raise UserError(f"'{path}' is not a regular file, so answers cannot go on in it; choose another place")
    lines, half = _lines(path)
    if half.strip(b"\0") and not half.startswith(b"{"):  # a disk that lost its power may leave zeros
        raise UserError(f"'{path}' is not a file of captured answers; choose another one")
    records = [_read_record(line, f"{path}:{n}", marks) for n, line in enumerate(lines, 1) if line.strip()]
    return {(tuple(r["image"]), r["prompt"]): r for r in records}


def _lines(path: Path) -> tuple[list[bytes], bytes]:
    """(whole lines of a file, what is left of a line that was not written to its end)."""
    try:
        *lines, last = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}; choose another file") from error
    if last.strip():
        with suppress(ValueError):  # whole but for its end, as editors leave it
            json.loads(last)
            return [*lines, last], b""
    return lines, last


def _end_last_line(path: Path) -> None:
    """Makes the file if needed, and have it end where a line ends: cuts half a line off, or ends one that is whole."""
    append(path, "")
    lines, half = _lines(path)
    if half:
        with path.open("rb+") as file:
            file.truncate(sum(len(line) + 1 for line in lines))
    elif lines and not path.read_bytes().endswith(b"\n"):
        append(path, "\n")


def _read_record(line: bytes, where: str, marks: Mapping[str, str]) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:  # not JSON, or not text at all
        record = None
    wrong = f"{where}: not a captured answer; delete the line if it is damaged, or choose another file"
    if not isinstance(record, dict) or not all(isinstance(record.get(k), kind) for k, kind in ASKED.items()):
        raise UserError(wrong)
    for name, value in marks.items():
        if record.get(name) != value:
            raise UserError(
                f"{where}: captured with {name} {record.get(name)!r}, this is {value!r}; choose another file"
            )
    if not all(isinstance(record.get(k), kind) for k, kind in ANSWERED.items()):
        raise UserError(wrong)
    return record


class _HasTask(Protocol):
    @property
    def task(self) -> str: ...


T = TypeVar("T", bound=_HasTask)


@dataclass(frozen=True)
class Captured:
    """One answer of the target. ids: all its tokens, the end token included where it came; gain: nats of each.

    events: an event camera's recording of what the images show; costs: [T, 2 + F] nats (see `msd.labels.gain`).
    """

    images: tuple[Path, ...]
    prompt: str
    ids: tuple[int, ...]
    gain: tuple[float, ...]
    task: str
    split: str
    events: Path | None = None
    costs: tuple[tuple[float, ...], ...] | None = None

    def labels(self, thresholds: ModalityThresholds) -> Tensor:
        """Modality ids [T] int64 of its tokens."""
        return thresholds.labels(self.gain, self.costs)


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


def label_thresholds_path(path: Path) -> Path:
    """Where the label thresholds of captured answers `path` are kept: beside it, with `.cuts.json` at the end."""
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


def fit_label_thresholds(records: Iterable[dict[str, Any]], target: str) -> ModalityThresholds | None:
    """Cuts from the records of the train part that have images (the rest is language); None where there are none."""
    shown = [r for r in records if r["split"] == "train" and r["image"]]
    if not shown:
        return None
    thresholds = ModalityThresholds.fit([r["gain"] for r in shown], target)
    costs = [r["costs"] for r in shown if "costs" in r]
    return thresholds.model_copy(update={"events": EventThresholds.fit(costs)}) if costs else thresholds


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
