"""Writes a model's answers to a JSON Lines file, resumably, and reads them back as training data for a drafter."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

from msd.bench.data import Sample, data_lines, image_folder
from msd.errors import UserError
from msd.labels.label_thresholds import EventThresholds, ModalityThresholds
from msd.system.files import append, exclusive, make_folder, named_in, write_whole

# fields of a record and their types
IDENTITY = {"image": list, "prompt": str, "answer": str, "ids": list}
STATUS = {"finished": bool, "task": str, "split": str}
TRAINING = {"image": list, "prompt": str, "ids": list, "gain": list, "task": str, "split": str}
RECAPTURE = "write the file with 'msd capture'"

Key = tuple[tuple[str, ...], str]  # (images, text) of a prompt


@dataclass(frozen=True)
class Prompt:
    """A prompt about zero or more images. images, events: file names as in the data; events: an event recording."""

    text: str
    images: tuple[str, ...] = ()
    task: str = ""
    split: str = "train"
    events: str | None = None

    @property
    def key(self) -> Key:
        """Prompts with equal keys are answered once."""
        return self.images, self.text


@dataclass(frozen=True)
class Answer:
    """A generated answer. ids: its tokens without the end token. finished: whether the model ended it.

    end: the end token, or None where the answer ended without one. gain: the image gain of each token in nats, the
    end token included. costs: the event costs of each token (`msd.labels.gain`), for prompts with events. Only
    writers that label (`TargetWriter`) set gain and costs.
    """

    text: str
    ids: tuple[int, ...]
    finished: bool
    end: int | None = None
    gain: tuple[float, ...] | None = None
    costs: tuple[tuple[float, ...], ...] | None = None

    @property
    def tokens(self) -> list[int]:
        """The ids, with the end token if there is one."""
        return [*self.ids, *(() if self.end is None else (self.end,))]


@dataclass(frozen=True)
class Decoding:
    """How answers are decoded: greedily at temperature 0. seed: of all sampled answers together."""

    temperature: float = 0.0
    seed: int = 0

    def seed_of(self, prompt: Prompt) -> int:
        """Returns the prompt's own seed, so that its answer depends neither on its batch nor on an interruption."""
        text = json.dumps([self.seed, list(prompt.images), prompt.text])
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")

    @property
    def sampled(self) -> bool:
        """Whether answers are sampled."""
        return self.temperature > 0

    @property
    def metadata(self) -> dict[str, float | None]:
        """What records of such answers state; greedy ones state neither."""
        return (
            {"temperature": self.temperature, "seed": self.seed}
            if self.sampled
            else {"temperature": None, "seed": None}
        )


Metadata = Mapping[str, str | float | None]  # fields of all records of a file; None: they do not have it
Writer = Callable[[Sequence[Prompt]], list[Answer]]  # generates one answer per prompt, in order
Stream = Callable[[Sequence[Prompt]], Iterator[list[tuple[Prompt, Answer]]]]  # yields answers as they are ready


def capture(
    prompts: Iterable[Prompt],
    write: Writer,
    path: Path,
    batch: int = 16,
    report: Callable[[int, int], None] | None = None,
    metadata: Metadata | None = None,
) -> list[dict[str, Any]]:
    """Writes one JSON Lines record per distinct prompt (images and text) to `path`; answers already there are kept.

    A record is `{"image": [...], "prompt", "answer", "ids", "finished", "task", "split"}`, with "end" and "gain" from a
    writer that labels, and the fields of `metadata`, such as the target's name. An interrupted run resumes where it
    stopped; an incomplete last line is dropped. Calls `report(done, total)` after each batch. Returns the records of
    all prompts, in the order of `prompts`. Raises UserError if `path` holds other content or records with other
    metadata, cannot be written, or is being written by another process.
    """

    def batches(todo: Sequence[Prompt]) -> Iterator[list[tuple[Prompt, Answer]]]:
        for start in range(0, len(todo), batch):
            group = todo[start : start + batch]
            yield list(zip(group, write(group), strict=True))

    return keep(prompts, batches, path, report, metadata)


def keep(
    prompts: Iterable[Prompt],
    stream: Stream,
    path: Path,
    report: Callable[[int, int], None] | None = None,
    metadata: Metadata | None = None,
) -> list[dict[str, Any]]:
    """Does `capture` with answers that come in any order: each list that `stream` yields is written at once."""
    metadata = metadata or {}
    make_folder(path.parent)
    with exclusive(path):
        distinct, done = _distinct(prompts), _read_records(path, metadata)
        todo = _sorted_todo(distinct, done)
        _end_last_line(path)
        count = len(distinct) - len(todo)
        for answers in stream(todo):
            records = {p.key: _record(p, a, metadata) for p, a in answers}
            done |= records
            append(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records.values()))
            count += len(answers)
            if report:
                report(count, len(distinct))
    return [done[p.key] for p in distinct]


def pending(prompts: Iterable[Prompt], path: Path, metadata: Metadata | None = None) -> list[Prompt]:
    """Returns the distinct prompts that `capture` has yet to answer, in the order in which it answers them."""
    return _sorted_todo(_distinct(prompts), _read_records(path, metadata or {}))


def read_answers(paths: Iterable[Path]) -> dict[Key, dict[str, Any]]:
    """Reads the records in files of captured answers, by prompt. Raises UserError for a missing file."""
    found: dict[Key, dict[str, Any]] = {}
    for path in paths:
        if not path.is_file():
            raise UserError(f"there is no file '{path}' of captured answers")
        found |= _read_records(path, {})
    return found


def _distinct(prompts: Iterable[Prompt]) -> list[Prompt]:
    """Returns the first prompt of each key."""
    first: dict[Key, Prompt] = {}
    for p in prompts:
        first.setdefault(p.key, p)
    return list(first.values())


def _sorted_todo(distinct: list[Prompt], done: Mapping[Key, Any]) -> list[Prompt]:
    """Returns the unanswered prompts by task, as answers of one task have similar lengths, then by image."""
    todo = [p for p in distinct if p.key not in done]
    return sorted(todo, key=lambda p: (len(p.images), p.events is None, p.task, p.images, len(p.text)))


def _record(prompt: Prompt, answer: Answer, metadata: Metadata) -> dict[str, Any]:
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
    return record | {name: value for name, value in metadata.items() if value is not None}


def _read_records(path: Path, metadata: Metadata) -> dict[Key, dict[str, Any]]:
    """Reads the records of an earlier run, without an incomplete last line."""
    if not path.exists():
        return {}
    if not path.is_file():  # a device, such as /dev/full, has no end
        raise UserError(f"'{path}' is not a regular file, so answers cannot be added to it; choose another path")
    lines, partial = _split_lines(path)
    if partial.strip(b"\0") and not partial.startswith(b"{"):  # a power failure may leave zero bytes
        raise UserError(f"'{path}' is not a file of captured answers; choose another one")
    records = [_parse_record(line, f"{path}:{n}", metadata) for n, line in enumerate(lines, 1) if line.strip()]
    return {(tuple(r["image"]), r["prompt"]): r for r in records}


def _split_lines(path: Path) -> tuple[list[bytes], bytes]:
    """Returns (complete lines, the incomplete last line)."""
    try:
        *lines, last = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}; choose another file") from error
    if last.strip():
        with suppress(ValueError):  # complete except for the line feed, as some editors save it
            json.loads(last)
            return [*lines, last], b""
    return lines, last


def _end_last_line(path: Path) -> None:
    """Creates the file if it is missing; removes an incomplete last line, or ends a complete one with a line feed."""
    append(path, "")
    whole = b"".join(line + b"\n" for line in _split_lines(path)[0])
    if path.read_bytes() != whole:
        write_whole(path, whole)


def _parse_record(line: bytes, where: str, metadata: Metadata) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:  # not JSON, or not text at all
        record = None
    wrong = f"{where}: not a captured answer; delete the line if it is damaged, or choose another file"
    if not isinstance(record, dict) or not all(isinstance(record.get(k), kind) for k, kind in IDENTITY.items()):
        raise UserError(wrong)
    for name, value in metadata.items():
        if record.get(name) != value:
            raise UserError(
                f"{where}: captured with {_named(name, record.get(name))}, not with {_named(name, value)}; "
                "choose another file"
            )
    if not all(isinstance(record.get(k), kind) for k, kind in STATUS.items()):
        raise UserError(wrong)
    return record


def _named(name: str, value: Any) -> str:
    return f"no {name}" if value is None else f"{name} {value!r}"


@dataclass(frozen=True)
class Captured:
    """A captured answer, to train on. ids: its tokens, the end token included. gain: the image gain of each, in nats.

    events: the event recording of the scene that the images show. costs: [T, 2 + F] nats (see `msd.labels.gain`).
    """

    images: tuple[Path, ...]
    prompt: str
    ids: tuple[int, ...]
    gain: tuple[float, ...]
    task: str
    split: str
    events: Path | None = None
    costs: tuple[tuple[float, ...], ...] | None = None


T = TypeVar("T", Captured, Sample)


def read_captured(path: Path, images: Path | None = None) -> list[Captured]:
    """Reads the answers that `msd capture` wrote. images: its --images folder; by default found as for data lines.

    Raises UserError with the line that is wrong or whose image is missing.
    """
    folder = image_folder(path, images)
    return [_captured(line, where, folder) for where, line in data_lines(path)]


def _captured(line: dict[str, Any], where: str, folder: Path) -> Captured:
    def require(valid: bool, problem: str) -> None:
        if not valid:
            raise UserError(f"{where}: {problem}")

    for name, kind in TRAINING.items():
        require(isinstance(line.get(name), kind), f"'{name}' is missing or not a {kind.__name__}; {RECAPTURE}")
    end, gain = line.get("end"), line["gain"]
    ids = (*line["ids"], *(() if end is None else (end,)))
    require(all(isinstance(i, int) and i >= 0 for i in ids), f"'ids' and 'end' must be token ids; {RECAPTURE}")
    require(_are_numbers(gain), f"'gain' must be finite numbers; {RECAPTURE}")
    require(len(ids) == len(gain), f"{len(gain)} gains for {len(ids)} answer tokens")
    require(bool(ids), "the answer has no tokens")
    names = line["image"]
    require(all(isinstance(n, str) for n in names), f"'image' must be a list of file names; {RECAPTURE}")
    images = tuple(named_in(folder, name) for name in names)
    for image in images:
        require(image.is_file(), f"image '{image}' does not exist; give the folder of the images")
    captured = Captured(images, line["prompt"], ids, tuple(gain), line["task"], line["split"])
    if "costs" not in line:
        return captured
    costs, events = line["costs"], line.get("events")
    if not isinstance(events, str) or not isinstance(costs, list):
        raise UserError(f"{where}: 'costs' without 'events', or not a list; {RECAPTURE}")
    numeric = all(isinstance(each, list) and _are_numbers(each) and len(each) == len(costs[0]) for each in costs)
    require(numeric, f"'costs' must be lists of finite numbers of one length; {RECAPTURE}")
    require(len(costs) == len(ids), f"{len(costs)} costs for {len(ids)} answer tokens")
    recording = named_in(folder, events)
    require(recording.is_file(), f"event recording '{recording}' does not exist; give the folder of the images")
    return replace(captured, events=recording, costs=tuple(map(tuple, costs)))


def _are_numbers(values: list[Any]) -> bool:
    return all(isinstance(value, int | float) and math.isfinite(value) for value in values)


def mixed(answers: Sequence[T], limit: int | None = None) -> list[T]:
    """Returns up to `limit` answers (or data lines), taken from the tasks in turn, so that each task is represented."""
    by_task: dict[str, list[T]] = {}
    for answer in answers:
        by_task.setdefault(answer.task, []).append(answer)
    turns = [a for group in zip_longest(*by_task.values()) for a in group if a is not None]
    return turns[:limit]


def check_labelled(records: Iterable[dict[str, Any]], path: Path) -> None:
    """Raises UserError unless every record of `path` has a gain for each of its tokens."""
    for record in records:
        gain, length = record.get("gain"), len(record["ids"]) + (record.get("end") is not None)
        if not isinstance(gain, list) or not _are_numbers(gain) or len(gain) != length:
            raise UserError(
                f"'{path}': the answer to {record['prompt']!r:.60} has no gain for each of its tokens; "
                "delete its line and run the same command again"
            )


def label_thresholds_path(path: Path) -> Path:
    """Returns the file with the label thresholds of the captured answers `path`: `path` with `.cuts.json` added."""
    return path.with_name(path.name + ".cuts.json")


def load_label_thresholds(captured: Path, path: Path | None = None) -> ModalityThresholds:
    """Loads the label thresholds in `path`, by default those next to `captured`; UserError if there are none."""
    path = path or label_thresholds_path(captured)
    if not path.exists():
        raise UserError(
            f"no label thresholds at '{path}'; 'msd capture' without --limit fits them, or give a file with --cuts"
        )
    return ModalityThresholds.load(path)


def fit_label_thresholds(records: Iterable[dict[str, Any]], target: str) -> ModalityThresholds | None:
    """Fits label thresholds on the train records with images (text-only answers are language); None without any."""
    with_images = [r for r in records if r["split"] == "train" and r["image"]]
    if not with_images:
        return None
    thresholds = ModalityThresholds.fit([r["gain"] for r in with_images], target)
    costs = [r["costs"] for r in with_images if "costs" in r]
    return thresholds.model_copy(update={"events": EventThresholds.fit(costs)}) if costs else thresholds
