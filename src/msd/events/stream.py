"""`EventStream`: the events of one camera in memory, ordered by time.

An event states that the brightness of one pixel rose (p = 1) or fell (p = 0) by a threshold at one moment. It takes 13
bytes: t int64, x and y uint16, p uint8.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from msd.errors import UserError

MAX_SIDE = 65_535  # pixels, the range of uint16
DTYPES = {"t": np.int64, "x": np.uint16, "y": np.uint16, "p": np.uint8}
Columns: TypeAlias = tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]
"""(t, x, y, p), each [N] of any integer type: decoded events that are not validated yet."""


@dataclass(frozen=True, eq=False)
class EventStream:
    """Events in the order of time; several may have the same time.

    Attributes:
        t: int64 [N], microseconds, never decreasing. The recording defines time zero.
        x, y: uint16 [N], pixels from the upper left corner, below the width and the height.
        p: uint8 [N], 1 for brighter, 0 for darker.
        size: (width, height) of the sensor in pixels.

    Raises:
        UserError: the arrays do not have these lengths and ranges. Integer arrays of other types are converted, and
            polarities -1 and 1 become 0 and 1.
    """

    t: NDArray[np.int64]
    x: NDArray[np.uint16]
    y: NDArray[np.uint16]
    p: NDArray[np.uint8]
    size: tuple[int, int]

    def __post_init__(self) -> None:
        size = check_size(self.size)
        columns = validated((self.t, self.x, self.y, self.p), size)
        for name, value in zip(DTYPES, columns, strict=True):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "size", size)

    def __len__(self) -> int:
        return len(self.t)

    @property
    def span(self) -> tuple[int, int]:
        """Times of the first and the last event, µs; (0, 0) without events."""
        return (int(self.t[0]), int(self.t[-1])) if len(self) else (0, 0)

    def part(self, first: int, last: int) -> EventStream:
        """Returns events number `first` to `last` - 1, as views of the same memory."""
        return unchecked(self.t[first:last], self.x[first:last], self.y[first:last], self.p[first:last], self.size)


def unchecked(t: Any, x: Any, y: Any, p: Any, size: tuple[int, int]) -> EventStream:
    """Builds a stream from arrays that are known to be valid: views of a stream, or output of `validated`."""
    stream = object.__new__(EventStream)
    for name, value in zip((*DTYPES, "size"), (t, x, y, p, size), strict=True):
        object.__setattr__(stream, name, value)
    return stream


def join(streams: Iterable[EventStream], size: tuple[int, int]) -> EventStream:
    """Concatenates streams that follow each other in time; UserError if they do not."""
    parts = list(streams)
    t, x, y, p = (
        np.concatenate([np.empty(0, dtype), *(getattr(part, name) for part in parts)]) for name, dtype in DTYPES.items()
    )
    return EventStream(t, x, y, p, size)


def check_size(size: tuple[int, int]) -> tuple[int, int]:
    """Returns (width, height) as ints; UserError unless both are from 1 to 65,535."""
    width, height = (int(side) for side in size)
    if not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE):
        raise UserError(f"a sensor of {width}x{height} pixels; width and height must be from 1 to {MAX_SIDE}")
    return width, height


def validated(columns: Columns, size: tuple[int, int]) -> Columns:
    """Returns the columns as int64, uint16, uint16, uint8; UserError if they are no events of a sensor of this size."""
    lengths = {len(column) for column in columns}
    if len(lengths) != 1 or any(column.ndim != 1 for column in columns):
        raise UserError(f"t, x, y and p have lengths {', '.join(str(len(c)) for c in columns)}; they must be equal")
    for name, column in zip(DTYPES, columns, strict=True):
        if column.dtype.kind not in "iub":
            raise UserError(f"event column {name} has type {column.dtype}; give integers (t in microseconds)")
    t, x, y, p = columns
    if t.dtype.kind == "u" and len(t) and int(t.max()) >> 63:
        raise UserError(f"a time is {int(t.max())}; times are microseconds, below 2**63")
    t = t.astype(np.int64, copy=False)
    if len(t) == 0:
        return t, x.astype(np.uint16), y.astype(np.uint16), p.astype(np.uint8)
    for name, column, side in (("x", x, size[0]), ("y", y, size[1])):
        low, high = int(column.min()), int(column.max())
        if low < 0 or high >= side:
            wrong = low if low < 0 else high
            raise UserError(f"an event has {name} = {wrong}, outside the sensor of {size[0]}x{size[1]} pixels")
    if p.dtype.kind == "i" and (p == -1).any():
        p = np.where(p == -1, 0, p)
    if p.dtype.kind != "b" and (p.min() < 0 or p.max() > 1):
        wrong = int(p.max() if p.max() > 1 else p.min())
        raise UserError(f"an event has polarity {wrong}; it must be 0 or 1 (or -1 and 1)")
    back = np.flatnonzero(t[1:] < t[:-1])
    if len(back):
        i = int(back[0])
        raise UserError(f"times go back from {t[i]} to {t[i + 1]} µs at event {i + 1}; order the events by time")
    return t, x.astype(np.uint16, copy=False), y.astype(np.uint16, copy=False), p.astype(np.uint8, copy=False)
