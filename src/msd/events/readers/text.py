"""`.csv` and `.txt`: an event a line, as spreadsheets, pandas, numpy and cameras write them (see `dialect`).

Lines that begin with # or % are remarks, which may tell the sensor size and the names of the columns.
"""

from __future__ import annotations

import codecs
import io
import itertools
import re
from collections.abc import Iterator
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from msd.errors import UserError
from msd.events.readers.dialect import WORDS, Dialect, microseconds, recognise, whole
from msd.events.readers.file import File
from msd.events.recording import Source
from msd.events.stream import Columns

LINE_LIMIT = 1000  # characters
LOOKED_AT = 1000  # lines
GEOMETRY = re.compile(r"[#%]\s*(?:geometry|size)\s*[:=]?\s*(\d{1,5})\s*[,x ]\s*(\d{1,5})\s*", re.IGNORECASE)


def read(file: File) -> Source:
    """What the first lines tell: how events are written, perhaps the sensor size."""
    file.one_recording()
    size = None
    sample: list[str] = []
    remarks: list[str] = []
    with _opened(file) as stream:
        for line in itertools.islice(_lines(stream), LOOKED_AT):
            geometry = GEOMETRY.fullmatch(line.strip())
            size = (int(geometry[1]), int(geometry[2])) if geometry else size
            if _is_remark(line):
                remarks.append(line)
            elif line.strip():
                sample.append(line)
    if not sample:
        raise UserError("it has no lines with events; give t,x,y,p lines")
    dialect = recognise(sample, remarks)
    return Source("text", lambda chunk: _columns(file, dialect, chunk), size, "header" if size else "events")


def _columns(file: File, dialect: Dialect, chunk: int) -> Iterator[Columns]:
    with _opened(file) as stream:
        filled = (dialect.clean(line) for line in _lines(stream) if not _is_remark(line) and not line.isspace())
        lines = itertools.islice(filled, dialect.skip, None)
        start = 1
        for block in iter(lambda: list(itertools.islice(lines, chunk)), []):
            yield _block(block, dialect, start)
            start += len(block)


def _block(lines: list[str], dialect: Dialect, start: int) -> Columns:
    """The events of some lines, of which the first is number `start`."""
    try:
        t = _numbers(lines, dialect, dialect.order[:1])[:, 0]
        rest = _numbers(lines, dialect, dialect.order[1:])
    except (ValueError, IndexError, OverflowError) as error:
        raise UserError(
            f"an event among number {start} to {start + len(lines) - 1} is not made of numbers "
            f"({error}); correct that line, or cut the file before it"
        ) from error
    if dialect.exact and t.dtype.kind == "f" and (t % 1).any():
        raise UserError(
            "its times are whole numbers at first and have fractions later; name their unit in a first line, "
            "as in t_s,x,y,p"
        )
    x, y, p = (whole(rest[:, i], name) for i, name in enumerate("xyp"))
    return microseconds(t, dialect.unit), x, y, p


def _numbers(lines: list[str], dialect: Dialect, columns: tuple[int, ...]) -> NDArray[Any]:
    """[N, columns]: int64, or float64 where something is written otherwise. ValueError for what is no number."""
    options: dict[str, Any] = {"comments": None, "delimiter": dialect.separator, "usecols": columns, "ndmin": 2}
    for kind in (np.int64, np.float64):
        try:
            return np.loadtxt(lines, kind, **options)
        except ValueError:
            continue
    words = np.loadtxt(lines, np.str_, **options)
    lower = np.char.lower(np.char.strip(words))
    for word, value in WORDS.items():
        lower = np.where(lower == word, str(value), lower)
    return lower.astype(np.float64)


def _opened(file: File) -> TextIO:
    """The file as text; bytes that are no text of its encoding are kept as marks of that."""
    stream = file.path.open("rb")
    start = stream.read(4)
    stream.seek(0)
    wide = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return io.TextIOWrapper(stream, encoding="utf-16" if wide else "utf-8-sig", errors="replace")


def _lines(stream: TextIO) -> Iterator[str]:
    """Lines, none longer than an event could be."""
    while line := stream.readline(LINE_LIMIT):
        if len(line) == LINE_LIMIT and not line.endswith("\n"):
            raise UserError(f"it has a line of more than {LINE_LIMIT} characters; it is no text of events")
        yield line


def _is_remark(line: str) -> bool:
    return line.lstrip(' "').startswith(("#", "%"))
