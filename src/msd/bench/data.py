"""Data lines: what to ask about which images, one JSON object a line."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from msd.errors import UserError
from msd.inputs.media import Video
from msd.system.files import named_in, shortened

BUNDLED = Path(__file__).parents[1] / "photos"


@dataclass(frozen=True)
class Sample:
    """A prompt of a data line. images: paths, in reading order, then videos.

    answer, tokens: another engine's output, if any. split: the part of its data set.
    before: earlier turns of the conversation. where: file and line, for messages. events: an event camera's
    recording of what they show, for drafters that see it.
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

    Only the prompt is needed. `"turns": [prompt, …]` in its place is a conversation, and gives a sample for every turn.
    `"video": "x.mp4" or […]` shows videos, after the images; `"events": "x.raw"` is an event camera's recording of what
    they show, for drafters that take events.
    path: the bundled photos and prompts by default. images: the folder of the images, by
    default the data file's own folder or `images/` beside it. UserError names the line that is wrong.
    """
    path = path or BUNDLED / "prompts.jsonl"
    folder = image_folder(path, images)
    return [sample for where, line in data_lines(path) for sample in _turns(line, where, folder)]


def in_suites(samples: Sequence[Sample], names: Sequence[str]) -> list[Sample]:
    """The samples whose task is one of `names`; all of them when there are no names. UserError for an unknown one."""
    known = list(dict.fromkeys(sample.task for sample in samples))
    for name in names:
        if name not in known:
            raise UserError(f"--suite '{name}' is no task of the data; it has {', '.join(known)}")
    return [sample for sample in samples if not names or sample.task in names]


def load_outputs(path: Path, images: Path | None = None) -> list[Sample]:
    """Data lines that also hold an engine's greedy output: `"tokens": [ids]`, or `"text": "…"`."""
    samples = []
    for where, line in data_lines(path):
        tokens, text = line.get("tokens"), line.get("text")
        if tokens is None and text is None:
            raise UserError(f"{where}: neither 'tokens' nor 'text'; an audited line holds the engine's output")
        if tokens is not None and not (isinstance(tokens, list) and all(type(t) is int and t >= 0 for t in tokens)):
            raise UserError(f"{where}: 'tokens' must be a list of token ids")
        if not isinstance(text, str | None):
            raise UserError(f"{where}: 'text' must be text, got {_told(text)}")
        sample = _sample({**line, "answer": text}, where, image_folder(path, images))
        samples.append(replace(sample, answer=text, tokens=None if tokens is None else tuple(tokens)))
    return samples


def image_folder(path: Path, images: Path | None = None) -> Path:
    """The folder that image names of the data file `path` start from; `images` if given, which must be a folder."""
    if images is not None:
        if not images.is_dir():
            raise UserError(f"--images '{images}' is not a folder")
        return images
    beside = path.parent / "images"
    return beside if beside.is_dir() else path.parent


def data_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(place, object) of every non-empty line. Lines end at line feeds alone: JSON texts may hold other separators.

    UserError, naming the line, for what is not one JSON object of UTF-8 text, as RFC 8259 has it.
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
    """The object of a line."""
    try:
        parsed = json.loads(line.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_number)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start + 1} of the line is not UTF-8; save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:  # JSONDecodeError, _once, _no_number, a number of thousands of digits
        raise UserError(f"{where}: not a JSON object ({getattr(error, 'msg', None) or error})") from error
    if not isinstance(parsed, dict):
        raise UserError(f"{where}: not a JSON object but {type(parsed).__name__}")
    half = re.search("[\ud800-\udfff]", json.dumps(parsed, ensure_ascii=False)) if b"\\u" in line else None
    if half is not None:
        raise UserError(f"{where}: half a character (\\u{ord(half[0]):04x}) without its other half; write both or none")
    return parsed


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, each of whose names is there once."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"'{next(name for name in names if names.count(name) > 1)}' is there twice")
    return found


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _turns(line: dict[str, Any], where: str, folder: Path) -> list[Sample]:
    """The samples of a line: one, or one for each of its turns."""
    if "turns" not in line:
        return [_sample(line, where, folder)]
    turns = line["turns"]
    if "prompt" in line or not isinstance(turns, list) or not turns:
        raise UserError(f"{where}: 'turns' is a list of prompts in the place of 'prompt', got {_told(turns)}")
    each = [_sample({**line, "prompt": turn, "answer": None}, where, folder) for turn in turns]
    return [replace(sample, before=tuple(turns[:i])) for i, sample in enumerate(each)]


def _sample(line: dict[str, Any], where: str, folder: Path) -> Sample:
    prompt = line.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f"{where}: 'prompt' must be text, got {_told(prompt)}")
    for name in ("answer", "task", "split"):
        if not isinstance(line.get(name), str | None):
            raise UserError(f"{where}: '{name}' must be text, got {_told(line[name])}")
    shown: tuple[Path | Video, ...] = (
        *_files(line, "image", where, folder),
        *map(Video, _files(line, "video", where, folder)),
    )
    seen = _files(line, "events", where, folder)
    if len(seen) > 1:
        raise UserError(f"{where}: {len(seen)} 'events'; a line has one recording")
    task, split = line.get("task") or "default", line.get("split") or "train"
    return Sample(shown, prompt, line.get("answer"), task, None, split, (), where, seen[0] if seen else None)


def _files(line: dict[str, Any], kind: str, where: str, folder: Path) -> list[Path]:
    """The files that a line names under `kind`."""
    named = line.get(kind)
    names = [] if named is None else [named] if isinstance(named, str) else named
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{where}: '{kind}' must be a file name or a list of file names, got {_told(named)}")
    for name in names:
        if not _is_file(named_in(folder, name)):
            raise UserError(
                f"{where}: {kind} '{shortened(str(folder / name))}' does not exist; name its folder with --images"
            )
    return [named_in(folder, name) for name in names]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long, a folder that may not be entered
        return False


def _told(value: Any) -> str:
    """A wrong value, at most a line of it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"
