"""Finds the columns t, x, y and p by their names, and converts them to integers and microseconds."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from msd.errors import UserError
from msd.events.stream import Columns

Names: TypeAlias = tuple[str, str, str, str]  # of t, x, y, p in a file
Unit: TypeAlias = tuple[int, int]  # microseconds, as a fraction
NAMES = (
    ("t", "ts", "timestamp", "timestamps", "time", "times"),
    ("x", "xs"),
    ("y", "ys"),
    ("p", "ps", "pol", "polarity", "polarities", "on"),
)
UNITS: dict[str, Unit] = {
    **dict.fromkeys(("s", "sec", "secs", "second", "seconds"), (1_000_000, 1)),
    **dict.fromkeys(("ms", "msec", "millisecond", "milliseconds"), (1000, 1)),
    # the last ones with both characters for µ, and with µ decoded wrongly
    **dict.fromkeys(("us", "usec", "microsecond", "microseconds", "µs", "μs", "\ufffds"), (1, 1)),
    **dict.fromkeys(("ns", "nsec", "nanosecond", "nanoseconds"), (1, 1000)),
}
WITH_UNIT = re.compile(rf"({'|'.join(NAMES[0])})(?:[ _./-]+|(?=[\[(]))[\[(]?\s*({'|'.join(UNITS)})\s*[\])]?")
SUFFIX = re.compile(r"\s*(?:[\[(].*[\])]|[ _](?:px|pixels?))$")  # after the name of x, y or p
MOST_MICROSECONDS = 9e18


def find_names(names: Iterable[str]) -> Names | None:
    """Returns the names of t, x, y and p among `names`; None if one of the four is missing."""
    by_plain: dict[str, str] = {}
    for name in names:
        by_plain.setdefault(_plain(name), name)
    t, x, y, p = (next((by_plain[name] for name in known if name in by_plain), None) for known in NAMES)
    return None if t is None or x is None or y is None or p is None else (t, x, y, p)


def unit_of(name: str) -> Unit | None:
    """Returns the unit in the name of a time column, such as "t [us]" or "timestamp_ns"."""
    match = WITH_UNIT.fullmatch(name.strip().lower())
    return UNITS[match[2]] if match else None


def event_columns(table: Any, names: Names) -> Columns:
    """Returns the columns of a mapping from names to arrays; floats become integers, times microseconds."""
    times, unit = np.asarray(table[names[0]]), unit_of(names[0])
    t = integers(times, names[0]) if unit is None else microseconds(times, unit)
    x, y, p = (integers(np.asarray(table[name]), name) for name in names[1:])
    return t, x, y, p


def common_length(shapes: Sequence[tuple[int, ...]]) -> int:
    """Returns the length of arrays with at most one axis longer than one; UserError for others, or several lengths."""
    lengths = {math.prod(shape) for shape in shapes}
    if len(lengths) != 1 or any(max(shape, default=1) != math.prod(shape) for shape in shapes):
        raise UserError(f"its arrays have the shapes {', '.join(map(str, shapes))}; they must be lists of one length")
    return lengths.pop()


def integers(column: Any, name: str) -> Any:
    """Returns floats with integer values as int64; UserError for other floats, which may be seconds or normalised."""
    if column.dtype.kind != "f":
        return column
    column = column.astype(np.float64)  # float16 cannot represent 2**53
    rounded = np.rint(column)
    if not np.isfinite(column).all() or (np.abs(column) > 2**53).any() or (rounded != column).any():
        raise UserError(f"column {name} has fractions; give whole numbers, times in microseconds")
    return rounded.astype(np.int64)


def microseconds(times: NDArray[Any], unit: Unit) -> NDArray[np.int64]:
    """Converts times [N], integers or floats in `unit`, to int64 microseconds, rounded; UserError on overflow."""
    numerator, denominator = unit
    if times.dtype.kind not in "iuf":
        raise UserError(f"times have type {times.dtype}; give numbers")
    factor = numerator / denominator
    if (~(np.abs(times.astype(np.float64)) * factor <= MOST_MICROSECONDS)).any():  # also NaN
        raise UserError("a time is no number, or too large; correct it, or name the unit of times, as in t_us")
    if times.dtype.kind == "f":
        return np.rint(times * factor).astype(np.int64)
    exact = times.astype(np.uint64 if times.dtype.kind == "u" else np.int64)  # has more digits than a float
    divisor = exact.dtype.type(denominator)
    return ((exact + divisor // 2) // divisor).astype(np.int64) * numerator


def _plain(name: str) -> str:
    """Returns a name in lower case and without its unit; a time with an unknown unit keeps it, and is not found."""
    lower = name.strip().lower()
    with_unit = WITH_UNIT.fullmatch(lower)
    plain = SUFFIX.sub("", lower)
    return with_unit[1] if with_unit else lower if plain in NAMES[0] else plain
