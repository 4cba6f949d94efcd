"""Reads `.csv` and `.txt`: one event per line, in the dialects of spreadsheets, pandas, numpy and cameras.

The first lines determine the dialect: separator, order of columns, unit of times. Lines that begin with # or % are
comments; they may state the sensor size and the names of the columns.
"""

from __future__ import annotations

import codecs
import io
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TextIO, TypeAlias

import numpy as np
from numpy.typing import NDArray

from msd.errors import UserError
from msd.events.readers.columns import UNITS, Unit, find_names, integers, microseconds, unit_of
from msd.events.readers.file import File
from msd.events.recording import Source
from msd.events.stream import Columns

Order: TypeAlias = tuple[int, int, int, int]  # indices of the columns t, x, y, p
LINE_LIMIT = 1000  # characters
SAMPLE = 1000  # lines that determine the dialect
# None: whitespace. Commas come after semicolons and tabs: a file with those may have decimal commas.
SEPARATORS = (";", "\t", ",", None)
VALUES = {"true": 1, "false": 0, "on": 1, "off": 0}
GEOMETRY = re.compile(r"[#%]\s*(?:geometry|size)\s*[:=]?\s*(\d{1,5})\s*[,x ]\s*(\d{1,5})\s*", re.IGNORECASE)
EXCEL = re.compile(r'"?sep=(.)"?\s*', re.IGNORECASE)
THOUSANDS = re.compile(r"[1-9]\d{0,2}(?:,\d{3})+")
INTEGER = re.compile(r"[+-]?\d+")
NO_EVENTS = "it has no lines with events; give t,x,y,p lines"


@dataclass(frozen=True)
class Dialect:
    """How a file writes its events.

    Attributes:
        separator: None for whitespace.
        skip: lines before the first event; comments and empty lines do not count.
        unit: of times.
        integer: whether the times of the sample are integers in microseconds.
    """

    separator: str | None
    order: Order
    skip: int
    unit: Unit
    integer: bool


def read(file: File) -> Source:
    """Reads the dialect, and the sensor size if stated, from the first lines."""
    size = None
    sample: list[str] = []
    comments: list[str] = []
    with _opened(file) as stream:
        for line in itertools.islice(_lines(stream), SAMPLE):
            geometry = GEOMETRY.fullmatch(line.strip())
            size = (int(geometry[1]), int(geometry[2])) if geometry else size
            if _is_comment(line):
                comments.append(line)
            elif line.strip():
                sample.append(line)
    if not sample:
        raise UserError(NO_EVENTS)
    dialect = _recognise(sample, comments)
    return Source("text", lambda chunk: _columns(file, dialect, chunk), size, "header" if size else "events")


def _columns(file: File, dialect: Dialect, chunk: int) -> Iterator[Columns]:
    with _opened(file) as stream:
        filled = (_unquoted(line) for line in _lines(stream) if not _is_comment(line) and not line.isspace())
        lines: Iterator[str] = itertools.islice(filled, dialect.skip, None)
        if dialect.separator != ",":
            lines = (line.replace(",", ".") for line in lines)  # decimal commas
        start = 1
        for block in iter(lambda: list(itertools.islice(lines, chunk)), []):
            yield _block(block, dialect, start)
            start += len(block)


def _block(lines: list[str], dialect: Dialect, start: int) -> Columns:
    """Parses the events of some lines, the first of which is event number `start`."""
    try:
        t = _numbers(lines, dialect, dialect.order[:1])[:, 0]
        rest = _numbers(lines, dialect, dialect.order[1:])
    except (ValueError, IndexError, OverflowError) as error:
        raise UserError(
            f"an event among number {start} to {start + len(lines) - 1} is not made of numbers "
            f"({error}); correct that line, or cut the file before it"
        ) from error
    if dialect.integer and t.dtype.kind == "f" and (t % 1).any():
        raise UserError(
            "its times are whole numbers at first and have fractions later; name their unit in a first line, "
            "as in t_s,x,y,p"
        )
    x, y, p = (integers(rest[:, i], name) for i, name in enumerate("xyp"))
    return microseconds(t, dialect.unit), x, y, p


def _numbers(lines: list[str], dialect: Dialect, columns: tuple[int, ...]) -> NDArray[Any]:
    """Returns int64 [N, columns], or float64 if any number is no plain integer. ValueError if it is no number."""
    options: dict[str, Any] = {"comments": None, "delimiter": dialect.separator, "usecols": columns, "ndmin": 2}
    for dtype in (np.int64, np.float64):
        try:
            return np.loadtxt(lines, dtype, **options)
        except ValueError:
            continue
    text = np.loadtxt(lines, np.str_, **options)
    return np.array([[float(VALUES.get(cell.strip().lower(), cell)) for cell in row] for row in text])


def _recognise(sample: Sequence[str], comments: Sequence[str]) -> Dialect:
    """Determines the dialect from the first lines; UserError if they are no list of events, or are ambiguous."""
    excel = EXCEL.fullmatch(sample[0])
    lines = [_unquoted(line) for line in sample[1 if excel else 0 :]]
    lines = [line for line in lines if line.endswith("\n")] or lines[:1]  # a truncated file ends within a line
    if not lines:
        raise UserError(NO_EVENTS)
    separator = _separator(lines, excel[1] if excel else None)
    named = any(c and math.isnan(_number(c)) and c.lower() != "nan" for c in _cells(lines[0], separator))
    body = [_cells(line, separator) for line in lines[int(named) :]]
    order, unit = _named_order(lines[0], body, separator) if named else _unnamed_order(comments, body)
    times = [cells[order[0]] for cells in body if len(cells) > order[0]]
    with_comma = [time for time in times if "," in time]
    if with_comma and all(THOUSANDS.fullmatch(time) for time in with_comma):
        raise UserError(f"its time {with_comma[0]} may have a decimal comma or be in thousands; write it without comma")
    integer = unit is None and all(INTEGER.fullmatch(time) for time in times)
    if unit is None:
        unit = UNITS["us"] if integer else _unit_of_values(times)
    return Dialect(separator, order, int(named) + int(bool(excel)), unit, integer)


def _named_order(head: str, body: Sequence[list[str]], separator: str | None) -> tuple[Order, Unit | None]:
    """Returns (indices of t, x, y, p; the unit of t) as the first line names them."""
    width = max((len(cells) for cells in body), default=0)
    cells = _cells(_joined_units(head) if separator is None else head, separator)
    names = find_names(cells)
    if names is None or any(cells.count(name) > 1 for name in names):
        raise UserError(f"its first line '{' '.join(cells)[:60]}' does not name t, x, y and p; name the columns so")
    shift = 1 if separator is None and width == len(cells) + 1 else 0  # pandas prints an index without a name
    if width > len(cells) + shift:
        raise UserError(f"its lines have {width} columns for {len(cells)} names; name all of them")
    t, x, y, p = (cells.index(name) + shift for name in names)
    return (t, x, y, p), unit_of(names[0])


def _unnamed_order(comments: Sequence[str], body: Sequence[list[str]]) -> tuple[Order, Unit | None]:
    """Returns (indices of t, x, y, p; the unit of t) as the last fitting comment names them, else by the values."""
    short = next((cells for cells in body if len(cells) < 4), None)
    if short is not None:
        raise UserError(f"its line '{' '.join(short)[:60]}' has fewer than four columns; give t,x,y,p lines")
    width = max((len(cells) for cells in body), default=0)
    if width > 4:
        raise UserError(f"its lines have {width} columns without names; name them in a first line, as in t,x,y,p")
    for comment in reversed(comments):
        words = [word.strip(":") for word in re.split(r"[,;\s]+", _joined_units(comment.strip("#% \n")))]
        names = find_names(words)
        if names is not None:
            places = sorted(words.index(name) for name in names)
            t, x, y, p = (places.index(words.index(name)) for name in names)
            return (t, x, y, p), unit_of(names[0])
    last, third = ({_number(cells[i]) for cells in body} for i in (3, 2))
    return ((3, 0, 1, 2) if not last <= {0, 1, -1} and third <= {0, 1, -1} else (0, 1, 2, 3)), None


def _unit_of_values(times: Sequence[str]) -> Unit:
    """Returns the unit of times that are not all integers and whose column names no unit; UserError if ambiguous."""
    values = [_number(time) for time in times]
    if any(value % 1 for value in values) or not any(values):
        return UNITS["s"]
    if any("e" in time.lower() for time in times):
        return UNITS["us"]
    raise UserError(
        "its times have a decimal point and no fractions, so they may be seconds or microseconds; "
        "name the unit in a first line, as in t_us,x,y,p or t_s,x,y,p"
    )


def _separator(lines: Sequence[str], stated: str | None) -> str | None:
    """Returns the first separator with at least four columns in all lines, else the first that occurs."""
    candidates = SEPARATORS if stated is None else (stated,)
    for separator in candidates:
        if all(len(_cells(line, separator)) >= 4 for line in lines):
            return separator
    return next((s for s in candidates if s is None or s in lines[0]), None)


def _cells(line: str, separator: str | None) -> list[str]:
    """Splits a line into columns; a separator at its end adds none."""
    cells = [cell.strip() for cell in line.split(separator)]
    return cells[:-1] if len(cells) > 1 and not cells[-1] else cells


def _joined_units(head: str) -> str:
    """Removes the whitespace before units in brackets, so that splitting at whitespace keeps "t [us]" in one piece."""
    return re.sub(r"\s+(?=[\[(])", "", head)


def _unquoted(line: str) -> str:
    return line.replace('"', "").replace("'", "")


def _number(cell: str) -> float:
    """Returns the value of a cell, or NaN."""
    try:
        return float(VALUES.get(cell.lower(), cell.replace(",", ".")))
    except ValueError:
        return float("nan")


def _is_comment(line: str) -> bool:
    return line.lstrip(' "').startswith(("#", "%"))


def _opened(file: File) -> TextIO:
    """Opens the file as UTF-8 or UTF-16 text; invalid bytes become replacement characters."""
    stream = file.path.open("rb")
    start = stream.read(4)
    stream.seek(0)
    wide = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return io.TextIOWrapper(stream, encoding="utf-16" if wide else "utf-8-sig", errors="replace")


def _lines(stream: TextIO) -> Iterator[str]:
    """Yields the lines; UserError for a line longer than any event."""
    while line := stream.readline(LINE_LIMIT):
        if len(line) == LINE_LIMIT and not line.endswith("\n"):
            raise UserError(f"it has a line of more than {LINE_LIMIT} characters; it is no text of events")
        yield line
