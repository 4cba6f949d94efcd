"""`.csv` and `.txt`: an event a line, columns separated by commas, semicolons or blanks.

Columns are named in a first line, or are t, x, y, p; or x, y, p, t as Prophesee's tools write them, if only that fits
(the last column of the first lines is not a polarity, the third is). Times are microseconds, or seconds if they have a
decimal point, as in the Event Camera Dataset. Lines that begin with # or % are remarks.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterator
from typing import TextIO

import numpy as np

from msd.errors import UserError
from msd.events.readers.file import File
from msd.events.readers.names import find
from msd.events.recording import Source
from msd.events.stream import Columns

LINE_LIMIT = 1000  # characters
GEOMETRY = re.compile(r"[#%]\s*(?:geometry|size)\s*[:=]?\s*(\d{1,5})\s*[,x ]\s*(\d{1,5})\s*", re.IGNORECASE)


def read(file: File) -> Source:
    """What the first lines tell: separator, order of the columns, perhaps the sensor size."""
    file.one_recording()
    size = None
    with _opened(file) as stream:
        sample: list[str] = []
        for line in itertools.islice(_lines(stream), 100):
            geometry = GEOMETRY.fullmatch(line.strip())
            size = (int(geometry[1]), int(geometry[2])) if geometry else size
            if line.strip() and line[0] not in "#%":
                sample.append(line)
    if not sample:
        raise UserError("it has no lines with events; give t,x,y,p lines")
    separator = next((s for s in ",;" if s in sample[0]), None)
    head = [word.strip() for word in sample[0].split(separator)]
    named = not all(_is_number(word) for word in head)
    order = _named_order(head) if named else _plain_order(sample, separator)
    return Source(
        "text",
        lambda chunk: _columns(file, separator, order, named, chunk),
        size,
        "header" if size else "events",
    )


def _named_order(head: list[str]) -> tuple[int, ...]:
    names = find(head)
    if names is None:
        raise UserError(f"its first line '{' '.join(head)[:60]}' does not name t, x, y and p; name the columns so")
    lower = [word.lower() for word in head]
    return tuple(lower.index(name.strip().lower()) for name in names)


def _plain_order(sample: list[str], separator: str | None) -> tuple[int, ...]:
    """Places of t, x, y, p in lines without names, from lines that are whole."""
    rows = [line.split(separator) for line in sample if line.endswith("\n")] or [sample[0].split(separator)]
    for row in rows:
        if len(row) < 4:
            raise UserError(f"its line '{' '.join(row)[:60]}' has fewer than four columns; give t,x,y,p lines")
    last, third = ({word.strip() for word in (row[i] for row in rows)} for i in (3, 2))
    polarities = {"0", "1", "-1"}
    return (3, 0, 1, 2) if not last <= polarities and third <= polarities else (0, 1, 2, 3)


def _columns(file: File, separator: str | None, order: tuple[int, ...], named: bool, chunk: int) -> Iterator[Columns]:
    with _opened(file) as stream:
        lines = (line for line in _lines(stream) if line[0] not in "#%" and not line.isspace())
        if named:
            next(lines, None)
        start, scale = 1, 0
        while block := list(itertools.islice(lines, chunk)):
            times = [order[0]]
            try:
                if not scale:
                    scale = 1_000_000 if "." in block[0].split(separator)[order[0]] else 1
                t = np.loadtxt(block, np.float64 if scale > 1 else np.int64, None, separator, None, 0, times, ndmin=1)
                rest = np.loadtxt(block, np.int64, None, separator, None, 0, list(order[1:]), ndmin=2)
            except (ValueError, IndexError, OverflowError) as error:
                raise UserError(
                    f"an event among number {start} to {start + len(block) - 1} is not made of numbers "
                    f"({error}); correct that line, or cut the file before it"
                ) from error
            if scale > 1:
                if not np.isfinite(t).all() or np.abs(t).max() > 9e12:
                    raise UserError("a time is no number of seconds; correct it, or give microseconds without a point")
                t = np.rint(t * scale).astype(np.int64)
            yield t, rest[:, 0], rest[:, 1], rest[:, 2]
            start += len(block)


def _opened(file: File) -> TextIO:
    return io.TextIOWrapper(file.path.open("rb"), encoding="latin-1")


def _lines(stream: TextIO) -> Iterator[str]:
    """Lines, none longer than an event could be."""
    while line := stream.readline(LINE_LIMIT):
        if len(line) == LINE_LIMIT and not line.endswith("\n"):
            raise UserError(f"it has a line of more than {LINE_LIMIT} characters; it is no text of events")
        yield line


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
