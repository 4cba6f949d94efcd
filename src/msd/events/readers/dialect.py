"""The names that files give to the four columns of events, and the units of time in them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msd.errors import UserError
from msd.events.stream import Columns

NAMES = (
    ("t", "ts", "timestamp", "timestamps", "time", "times"),
    ("x", "xs"),
    ("y", "ys"),
    ("p", "ps", "pol", "polarity", "polarities", "on"),
)
UNITS = {  # microseconds, as a fraction
    **dict.fromkeys(("s", "sec", "secs", "second", "seconds"), (1_000_000, 1)),
    **dict.fromkeys(("ms", "msec", "millisecond", "milliseconds"), (1000, 1)),
    **dict.fromkeys(("us", "µs", "μs", "\ufffds", "usec", "microsecond", "microseconds"), (1, 1)),  # also misread
    **dict.fromkeys(("ns", "nsec", "nanosecond", "nanoseconds"), (1, 1000)),
}
WITH_UNIT = re.compile(rf"({'|'.join(NAMES[0])})(?:[ _./-]+|(?=[\[(]))[\[(]?\s*({'|'.join(UNITS)})\s*[\])]?")
REMARK = re.compile(r"\s*(?:[\[(].*[\])]|[ _](?:px|pixels?))$")  # behind the name of x, y or p
MOST_MICROSECONDS = 9e18
Unit = tuple[int, int]


def find(names: Iterable[str]) -> tuple[str, str, str, str] | None:
    """Which of some names are t, x, y and p; nothing where one of the four is missing."""
    by_known: dict[str, str] = {}
    for name in names:
        by_known.setdefault(_known(name), name)
    found = [next((by_known[name] for name in known if name in by_known), None) for known in NAMES]
    t, x, y, p = found
    return None if t is None or x is None or y is None or p is None else (t, x, y, p)


def unit(name: str) -> Unit | None:
    """The unit that the name of a column of times tells, such as "t [us]" or "timestamp_ns", in microseconds."""
    found = WITH_UNIT.fullmatch(name.strip().lower())
    return UNITS[found[2]] if found else None


def columns_of(table: Any, names: tuple[str, str, str, str]) -> Columns:
    """The four columns of anything that gives arrays by name, with whole numbers stored as floats made integers."""
    times, told = np.asarray(table[names[0]]), unit(names[0])
    t = whole(times, names[0]) if told is None else microseconds(times, told)
    x, y, p = (whole(np.asarray(table[name]), name) for name in names[1:])
    return t, x, y, p


def whole(column: Any, name: str) -> Any:
    """Floats that are whole numbers as int64; UserError for other floats, which would be seconds or normalised."""
    if column.dtype.kind != "f":
        return column
    column = column.astype(np.float64)  # float16 has no 2**53
    rounded = np.rint(column)
    if not np.isfinite(column).all() or (np.abs(column) > 2**53).any() or (rounded != column).any():
        raise UserError(f"column {name} has fractions; give whole numbers, times in microseconds")
    return rounded.astype(np.int64)


def microseconds(times: NDArray[Any], told: Unit) -> NDArray[np.int64]:
    """Times [N], integers or floats, of a unit as int64 microseconds, rounded; UserError for what does not fit."""
    many, of = told
    if times.dtype.kind not in "iuf":
        raise UserError(f"times have type {times.dtype}; give numbers")
    if (~(np.abs(times.astype(np.float64)) * (many / of) <= MOST_MICROSECONDS)).any():  # also NaN
        raise UserError("a time is no number, or too large; correct it, or name the unit of times, as in t_us")
    if times.dtype.kind == "f":
        return np.rint(times * (many / of)).astype(np.int64)
    exact = times.astype(np.uint64 if times.dtype.kind == "u" else np.int64)  # of more digits than a float has
    return ((exact + exact.dtype.type(of // 2)) // exact.dtype.type(of)).astype(np.int64) * many


def _known(name: str) -> str:
    """A name without its unit, in small letters."""
    lower = name.strip().lower()
    with_unit = WITH_UNIT.fullmatch(lower)
    plain = REMARK.sub("", lower)
    return with_unit[1] if with_unit else lower if plain in NAMES[0] else plain  # times of a unit that is not known


SEPARATORS = (";", "\t", ",", None)  # None: blanks. A file with semicolons or tabs has commas within its numbers.
WORDS = {"true": 1, "false": 0, "on": 1, "off": 0}
EXCEL = re.compile(r'"?sep=(.)"?\s*', re.IGNORECASE)
THOUSANDS = re.compile(r"[1-9]\d{0,2}(?:,\d{3})+")
WHOLE = re.compile(r"[+-]?\d+")


@dataclass(frozen=True)
class Dialect:
    """separator: None for blanks. order: places of t, x, y, p in a line. skip: lines before the first event, without
    remarks and blank lines. unit: of times. exact: whether times without fractions are expected.
    """

    separator: str | None
    order: tuple[int, int, int, int]
    skip: int
    unit: Unit
    exact: bool

    def clean(self, line: str) -> str:
        """A line without quotes, with a point in its numbers."""
        return _unquoted(line if self.separator == "," else line.replace(",", "."))


def recognise(sample: Sequence[str], remarks: Sequence[str]) -> Dialect:
    """The dialect of a file by its first lines and the remarks among them. UserError for what is no list of events."""
    given = EXCEL.fullmatch(sample[0])
    lines = [_unquoted(line) for line in sample[1 if given else 0 :]]
    lines = [line for line in lines if line.endswith("\n")] or lines[:1]  # a file that is cut off ends within a line
    if not lines:
        raise UserError("it has no lines with events; give t,x,y,p lines")
    separator = _separator(lines, given[1] if given else None)
    named = any(cell and not _is_number(cell) for cell in _cells(lines[0], separator))
    body = [_cells(line, separator) for line in lines[int(named) :]]
    order, told = _order(lines[0], named, remarks, body, separator)
    times = [cells[order[0]] for cells in body if len(cells) > order[0]]
    with_comma = [time for time in times if "," in time]
    if with_comma and all(THOUSANDS.fullmatch(time) for time in with_comma):
        raise UserError(f"its time {with_comma[0]} may have a decimal comma or be in thousands; write it without comma")
    exact = told is None and all(WHOLE.fullmatch(time) for time in times)
    known = told or (UNITS["us"] if exact else _plain_unit([_number(time) for time in times], times))
    return Dialect(separator, order, int(named) + int(bool(given)), known, exact)


def _order(
    head: str, named: bool, remarks: Sequence[str], body: Sequence[list[str]], separator: str | None
) -> tuple[tuple[int, int, int, int], Unit | None]:
    """(places of t, x, y, p; the unit that the name of t tells)."""
    width = max((len(cells) for cells in body), default=0)
    if named:
        head = re.sub(r"\s+(?=[\[(])", "", head) if separator is None else head
        cells = _cells(head, separator)
        names = find(cells)
        if names is None or any(cells.count(name) > 1 for name in names):
            raise UserError(f"its first line '{' '.join(cells)[:60]}' does not name t, x, y and p; name the columns so")
        shift = 1 if separator is None and width == len(cells) + 1 else 0  # of a numbered table, as pandas prints it
        if width > len(cells) + shift:
            raise UserError(f"its lines have {width} columns for {len(cells)} names; name all of them")
        t, x, y, p = (cells.index(name) + shift for name in names)
        return (t, x, y, p), unit(names[0])
    short = next((cells for cells in body if len(cells) < 4), None)
    if short is not None:
        raise UserError(f"its line '{' '.join(short)[:60]}' has fewer than four columns; give t,x,y,p lines")
    if width > 4:
        raise UserError(f"its lines have {width} columns without names; name them in a first line, as in t,x,y,p")
    for remark in reversed(remarks):
        words = [word.strip(":") for word in re.split(r"[,;\s]+", re.sub(r"\s+(?=[\[(])", "", remark.strip("#% \n")))]
        names = find(words)
        if names is not None:
            places = sorted(words.index(name) for name in names)
            t, x, y, p = (places.index(words.index(name)) for name in names)
            return (t, x, y, p), unit(names[0])
    last, third = ({_number(cells[i]) for cells in body} for i in (3, 2))
    return ((3, 0, 1, 2) if not last <= {0, 1, -1} and third <= {0, 1, -1} else (0, 1, 2, 3)), None


def _plain_unit(values: Sequence[float], times: Sequence[str]) -> Unit:
    """The unit of times that are not written as whole numbers and have no unit in their name."""
    if any(value % 1 for value in values) or not any(values):
        return UNITS["s"]
    if any("e" in time.lower() for time in times):
        return UNITS["us"]
    raise UserError(
        "its times have a decimal point and no fractions, so they may be seconds or microseconds; "
        "name the unit in a first line, as in t_us,x,y,p or t_s,x,y,p"
    )


def _separator(lines: Sequence[str], given: str | None) -> str | None:
    """The first separator that gives at least four columns throughout, or else one that is there."""
    candidates = SEPARATORS if given is None else (given,)
    for separator in candidates:
        if all(len(_cells(line, separator)) >= 4 for line in lines):
            return separator
    return next((s for s in candidates if s is None or s in lines[0]), None)


def _cells(line: str, separator: str | None) -> list[str]:
    """The columns of a line; one that ends with a separator has none behind it."""
    cells = [cell.strip() for cell in line.split(separator)]
    return cells[:-1] if len(cells) > 1 and not cells[-1] else cells


def _unquoted(line: str) -> str:
    return line.replace('"', "").replace("'", "")


def _number(cell: str) -> float:
    """The value of a cell; NaN where it is none."""
    try:
        return float(WORDS.get(cell.lower(), cell.replace(",", ".")))
    except ValueError:
        return float("nan")


def _is_number(cell: str) -> bool:
    value = _number(cell)
    return value == value or cell.lower() == "nan"
