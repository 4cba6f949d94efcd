"""How a stream or a recording is cut into frames of equal count or equal time, piece by piece.

A frame is a run of events. Cutting needs to know the whole first (how many events, or from when to when): a stream in
memory knows, a recording is read once to find out and once more to be cut. A piece never spans two frames or two
chunks, so whatever is made of frames is made incrementally, in memory that does not depend on the number of events.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from msd.errors import UserError
from msd.events.recording import Recording
from msd.events.stream import EventStream

Events: TypeAlias = EventStream | Recording
By: TypeAlias = Literal["count", "time"]
MAX_FRAMES = 10_000
MAX_PIXELS = 250_000_000  # of all layers of a representation together


@dataclass(frozen=True)
class Extent:
    """How many events there are, and the times of the first and the last, µs."""

    events: int
    begin: int
    end: int


def extent(events: Events) -> Extent:
    """The extent of a stream, or of a recording by reading it."""
    count, begin, end = 0, 0, 0
    for chunk in chunks(events):
        begin = begin if count else chunk.span[0]
        count, end = count + len(chunk), chunk.span[1]
    return Extent(count, begin, end)


def chunks(events: Events) -> Iterator[EventStream]:
    """A recording's chunks, or the stream itself if it has events."""
    return (chunk for chunk in ((events,) if isinstance(events, EventStream) else events) if len(chunk))


def edges(whole: Extent, count: int, by: By) -> NDArray[np.int64]:
    """[count + 1] borders of frames: event numbers by "count", times in µs by "time".

    By count, every frame has events // count events and the last one takes the rest too, as in EventGPT; by time, all
    are equally long to a microsecond, and the last one has the last event.
    """
    if by not in ("count", "time"):
        raise UserError(f"frames by '{by}'; choose 'count' (equally many events) or 'time' (equally long)")
    if not 1 <= count <= MAX_FRAMES:
        raise UserError(f"{count} frames; ask for 1 to {MAX_FRAMES}")
    numbers = np.arange(count + 1, dtype=np.int64)
    if by == "count":
        borders = numbers * (whole.events // count)
        borders[-1] = whole.events
        return borders
    return whole.begin + numbers * (whole.end + 1 - whole.begin) // count


def check_room(layers: int, size: tuple[int, int]) -> None:
    """UserError for a representation that would take gigabytes: a damaged header may tell of any sensor."""
    if layers * size[0] * size[1] > MAX_PIXELS:
        raise UserError(
            f"{layers} layers of {size[0]}x{size[1]} are more than {MAX_PIXELS // 10**6} million pixels; "
            "ask for fewer, or check the sensor size"
        )


def cut(events: Events, borders: NDArray[np.int64], by: By) -> Iterator[tuple[int, EventStream]]:
    """(number of the frame, some of its events) in order; `borders` as `edges` gives them."""
    passed = 0
    for chunk in chunks(events):
        places = np.clip(borders - passed, 0, len(chunk)) if by == "count" else np.searchsorted(chunk.t, borders)
        for frame, (first, last) in enumerate(pairwise(places)):
            if last > first:
                yield frame, chunk.part(int(first), int(last))
        passed += len(chunk)
