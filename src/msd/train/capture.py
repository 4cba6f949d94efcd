"""Answers written by a model, for training another on: batched, resumable, each question once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from msd.errors import UserError
from msd.system.files import append, exclusive, make_folder

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
    prompts with events, what each token owes to them (`msd.labels.event_gain`). They are only known to writers that
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
