"""Writes samples as data lines that MMSpec's and Spec-Bench's tools read, one conversation a line."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msd.bench.data import Sample, data_lines
from msd.errors import UserError
from msd.inputs.media import Video
from msd.system.files import check_place, write_whole


def export(samples: Sequence[Sample], out: Path) -> int:
    """Writes the conversations of `samples` to the file `out`; returns their number.

    A line holds MMSpec's `id`, `image`, `turns`, `category` and `topic`; without an image it holds Spec-Bench's
    `question_id`, `turns` and `category`, with SPEED-Bench's `turns` alike. Image names are relative to the folder of
    `out`. Answers are left out, as the formats have none. UserError for videos, event recordings and several images in
    a line, which the formats have no place for, and for an existing file that holds anything else.
    """
    check_place(out)
    if out.exists() and not _replaceable(out):
        raise UserError(f"'{out}' exists and holds no such data lines; name another file")
    lines = [_line(sample, number, out.parent) for number, sample in enumerate(_last_turns(samples), 1)]
    write_whole(out, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return len(lines)


def _replaceable(file: Path) -> bool:
    """Whether every line of a file is one that `export` writes."""
    try:
        lines = [line for _, line in data_lines(file)]
    except UserError:
        return file.stat().st_size == 0
    return all("turns" in line and "category" in line and line.keys() & {"id", "question_id"} for line in lines)


def _last_turns(samples: Sequence[Sample]) -> list[Sample]:
    """Returns the last sample of each conversation, which holds all its turns."""
    following = [*samples[1:], None]
    return [s for s, after in zip(samples, following, strict=True) if after is None or not _continues(s, after)]


def _continues(sample: Sample, after: Sample) -> bool:
    same = (after.where, after.images) == (sample.where, sample.images)
    return same and after.before == (*sample.before, sample.prompt)


def _line(sample: Sample, number: int, folder: Path) -> dict[str, Any]:
    turns = [*sample.before, sample.prompt]
    if sample.events is not None or any(isinstance(image, Video) for image in sample.images):
        raise UserError(f"{sample.where}: MMSpec's and Spec-Bench's data lines hold no videos and events; leave it out")
    if len(sample.images) > 1:
        raise UserError(f"{sample.where}: MMSpec's data lines hold one image, not {len(sample.images)}; leave it out")
    if not sample.images:
        return {"question_id": number, "category": sample.task, "turns": turns}
    image = Path(str(sample.images[0]))
    name = os.path.relpath(image.resolve(), folder.resolve())
    return {"id": str(number), "image": name, "turns": turns, "category": sample.task, "topic": sample.task}
