"""Reads prompts and their images from data files: one JSON object a line."""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from msd.bench.chat_lines import as_turns
from msd.errors import UserError
from msd.inputs.media import Video
from msd.system.files import named_in, shortened

BUNDLED = Path(__file__).parents[1] / "photos"


@dataclass(frozen=True)
class Sample:
    """One prompt of a data line.

    images: image paths in reading order, then videos. answer, tokens: another engine's output, for an audit.
    split: part of the data set. before: earlier user turns of the conversation. where: file and line, for messages.
    events: an event camera's recording of the same scene, for drafters that read events.
    """

    images: tuple[Path | Video, ...]
    prompt: str
    answer: str | None
    task: str
    tokens: tuple[int, ...] | None = None
    split: str = "train"
    before: tuple[str, ...] = ()
    where: str = field(default="", compare=False)
    events: Path | None = None


def load_data(path: Path | None, images: Path | None = None) -> list[Sample]:
    """Reads `{"image": "x.jpg" or […], "prompt": "…", "answer": "…", "task": "…", "split": "…"}` lines.

    Only the prompt is required. `"turns": [prompt, …]` instead of it gives one sample per turn of a conversation, and
    so does a chat in `"messages"` or `"conversations"` (`msd.bench.chat_lines`). A line without task has its
    `"category"` as the task (MMSpec, Spec-Bench, SPEED-Bench).
    `"video": "x.mp4" or […]` adds videos after the images; `"events": "x.raw"` adds an event camera's recording.
    path: by default the bundled prompts. images: the folder of the images, by default `images/` next to the data file,
    or else the file's own folder. Raises UserError that names the wrong line.
    """
    path = path or BUNDLED / "prompts.jsonl"
    folder = image_folder(path, images)
    return [s for where, line in data_lines(path) for s in _turns(as_turns(line, where), where, folder)]


def in_suites(samples: Sequence[Sample], names: Sequence[str]) -> list[Sample]:
    """Returns the samples of the tasks `names`, or all if `names` is empty. Raises UserError for an unknown task."""
    known = list(dict.fromkeys(sample.task for sample in samples))
    for name in names:
        if name not in known:
            raise UserError(f"--suite '{name}' is no task of the data; it has {', '.join(known)}")
    return [sample for sample in samples if not names or sample.task in names]


def load_outputs(path: Path, images: Path | None = None) -> list[Sample]:
    """Reads data lines that also hold another engine's greedy output: `"tokens": [ids]` or `"text": "…"`."""
    samples = []
    for where, line in data_lines(path):
        tokens, text = line.get("tokens"), line.get("text")
        if tokens is None and text is None:
            raise UserError(f"{where}: neither 'tokens' nor 'text'; give the engine's output as one of them")
        if tokens is not None and not (isinstance(tokens, list) and all(type(t) is int and t >= 0 for t in tokens)):
            raise UserError(f"{where}: 'tokens' must be a list of token ids")
        if not isinstance(text, str | None):
            raise UserError(f"{where}: 'text' must be text, got {shortened(repr(text))}")
        sample = _sample({**line, "answer": text}, where, image_folder(path, images))
        samples.append(replace(sample, answer=text, tokens=None if tokens is None else tuple(tokens)))
    return samples


def image_folder(path: Path, images: Path | None = None) -> Path:
    """Returns the folder that image names of the data file `path` are relative to.

    images: that folder, if the user named one. Raises UserError if it does not exist.
    """
    if images is not None:
        if not images.is_dir():
            raise UserError(f"--images '{images}' is not a folder")
        return images
    default = path.parent / "images"
    return default if default.is_dir() else path.parent


def data_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Returns ("PATH:NUMBER", JSON object) for each line; lines are counted from 1, blank ones are skipped.

    Only a line feed ends a line, since JSON strings may hold other line separators such as U+2028. Raises UserError for
    an unreadable file, one without lines, and (naming the line) for anything but one JSON object in UTF-8 (RFC 8259).
    """
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise UserError(f"cannot read data '{path}': {getattr(error, 'strerror', None) or error}") from error
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"'{path}' is UTF-16 text; save it as UTF-8")
    numbered = enumerate(data.removeprefix(codecs.BOM_UTF8).split(b"\n"), 1)
    lines = [(f"{path}:{number}", _parsed(line, f"{path}:{number}")) for number, line in numbered if line.strip()]
    if not lines:
        raise UserError(f"'{path}' holds no data lines")
    return lines


def _parsed(line: bytes, where: str) -> dict[str, Any]:
    try:
        parsed = json.loads(line.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start + 1} of the line is not UTF-8; save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:  # JSONDecodeError, _unique, _refuse_constant, an integer too long
        raise UserError(f"{where}: not a JSON object ({getattr(error, 'msg', None) or error})") from error
    if not isinstance(parsed, dict):
        raise UserError(f"{where}: not a JSON object but {type(parsed).__name__}")
    half = re.search("[\ud800-\udfff]", json.dumps(parsed, ensure_ascii=False)) if b"\\u" in line else None
    if half is not None:
        raise UserError(f"{where}: half a character (\\u{ord(half[0]):04x}) without its other half; write both or none")
    return parsed


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuses a JSON object with a repeated name."""
    parsed = dict(pairs)
    if len(parsed) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"'{next(name for name in names if names.count(name) > 1)}' is there twice")
    return parsed


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _turns(line: dict[str, Any], where: str, folder: Path) -> list[Sample]:
    """Returns the sample of a line, or one sample per turn."""
    if "turns" not in line:
        return [_sample(line, where, folder)]
    turns = line["turns"]
    if "prompt" in line or not isinstance(turns, list) or not turns:
        raise UserError(f"{where}: 'turns' is a list of prompts that replaces 'prompt', got {shortened(repr(turns))}")
    samples = [_sample({**line, "prompt": turn, "answer": None}, where, folder) for turn in turns]
    return [replace(sample, before=tuple(turns[:i])) for i, sample in enumerate(samples)]


def _sample(line: dict[str, Any], where: str, folder: Path) -> Sample:
    prompt = line.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f"{where}: 'prompt' must be text, got {shortened(repr(prompt))}")
    for name in ("answer", "task", "category", "split"):
        if not isinstance(line.get(name), str | None):
            raise UserError(f"{where}: '{name}' must be text, got {shortened(repr(line[name]))}")
    images: tuple[Path | Video, ...] = (
        *_files(line, "image", where, folder),
        *map(Video, _files(line, "video", where, folder)),
    )
    events = _files(line, "events", where, folder)
    if len(events) > 1:
        raise UserError(f"{where}: {len(events)} 'events'; a line has one recording")
    task, split = line.get("task") or line.get("category") or "default", line.get("split") or "train"
    return Sample(images, prompt, line.get("answer"), task, None, split, (), where, events[0] if events else None)


def _files(line: dict[str, Any], kind: str, where: str, folder: Path) -> list[Path]:
    """Returns the paths of the files that a line names under the key `kind`."""
    value = line.get(kind)
    names = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{where}: '{kind}' must be a file name or a list of file names, got {shortened(repr(value))}")
    for name in names:
        if not os.path.isfile(named_in(folder, name)):  # noqa: PTH113 -- no error for a name that is too long
            raise UserError(
                f"{where}: {kind} '{shortened(str(folder / name))}' does not exist; name its folder with --images"
            )
    return [named_in(folder, name) for name in names]
