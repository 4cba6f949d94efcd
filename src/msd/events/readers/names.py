"""The names that files give to the four columns of events."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from msd.errors import UserError
from msd.events.stream import Columns

NAMES = (
    ("t", "ts", "timestamp", "timestamps", "time"),
    ("x", "xs"),
    ("y", "ys"),
    ("p", "ps", "pol", "polarity", "polarities", "on"),
)


def find(names: Iterable[str]) -> tuple[str, str, str, str] | None:
    """Which of some names are t, x, y and p; nothing where one of the four is missing."""
    by_lower = {name.strip().lower(): name for name in names}
    found = [next((by_lower[name] for name in known if name in by_lower), None) for known in NAMES]
    t, x, y, p = found
    return None if t is None or x is None or y is None or p is None else (t, x, y, p)


def columns_of(table: Any, names: tuple[str, str, str, str]) -> Columns:
    """The four columns of anything that gives arrays by name, with whole numbers stored as floats made integers."""
    t, x, y, p = (whole(np.asarray(table[name]), name) for name in names)
    return t, x, y, p


def whole(column: Any, name: str) -> Any:
    """Floats that are whole numbers as int64; UserError for other floats, which would be seconds or normalised."""
    if column.dtype.kind != "f":
        return column
    rounded = np.rint(column)
    if not np.isfinite(column).all() or (np.abs(column) > 2**53).any() or (rounded != column).any():
        raise UserError(f"column {name} has fractions; give whole numbers, times in microseconds")
    return rounded.astype(np.int64)
