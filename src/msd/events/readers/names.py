"""The names that files give to the four columns of events, and the units of time in them."""

from __future__ import annotations

import re
from collections.abc import Iterable
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
