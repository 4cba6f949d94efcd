"""`Recording`: an event file that is open for reading in bounded chunks, whatever its format.

A reader gives a `Source`: what the header says, and a function that decodes the file from the start, a chunk at a time.
Chunks of about a million events (13 MB, some 100 MB while they are decoded) are all that is ever held, so a file of any
length can be looked at; who needs to know the whole first (how many events, how long) iterates twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from msd.errors import UserError
from msd.events.stream import Columns, EventStream, check_size, checked, join, unchecked

CHUNK = 1_000_000


@dataclass(frozen=True)
class Source:
    """What a reader knows of a file.

    Attributes:
        format: the name of the format, such as "evt3".
        columns: from a number of events to the events of the file in order, in pieces of about that many.
        size: (width, height) of the sensor, if the file or its format tells.
        size_from: where the size is from: "header", "sensor name", "format" or "events".
        count: number of events, if the header tells.
    """

    format: str
    columns: Callable[[int], Iterator[Columns]]
    size: tuple[int, int] | None = None
    size_from: str = "events"
    count: int | None = None


@dataclass(frozen=True, eq=False)
class Recording:
    """An event file, read from its start by each `for chunk in recording`.

    Chunks are `EventStream`s that follow each other in time and have at least one event. UserError, naming the file,
    is raised where the file is broken: chunks before that place have been given.
    """

    path: Path
    source: Source
    chunk: int = CHUNK
    given_size: tuple[int, int] | None = None

    @property
    def format(self) -> str:
        """The name of the format, such as "evt3"."""
        return self.source.format

    @cached_property
    def size(self) -> tuple[int, int]:
        """(width, height): as given, as the file tells, or else just large enough for all events (the file is read)."""
        return self._size() or self._fit(self._columns())

    @property
    def size_from(self) -> str:
        """Where the size is from: "given", "header", "sensor name", "format" or "events"."""
        return "given" if self.given_size is not None else self.source.size_from

    def __iter__(self) -> Iterator[EventStream]:
        size, last = self.size, None
        for columns in self._columns():
            with self._named():
                t, x, y, p = checked(columns, size)
                if last is not None and t[0] < last:
                    raise UserError(f"times go back from {last} to {t[0]} µs; order the events by time")
            last = t[-1]
            yield unchecked(t, x, y, p, size)

    def read(self) -> EventStream:
        """All events at once: 13 bytes each, decoded in one pass even where they tell the size."""
        pieces = list(self._columns())
        size = self._size() or self._fit(pieces)
        with self._named():
            return join([unchecked(*checked(piece, size), size) for piece in pieces], size)

    def _size(self) -> tuple[int, int] | None:
        with self._named():
            return check_size(self.given_size) if self.given_size is not None else self.source.size

    def _columns(self) -> Iterator[Columns]:
        """Decoded pieces that are not empty."""
        pieces = self.source.columns(self.chunk)
        while True:
            with self._named():
                piece = next(pieces, None)
            if piece is None:
                return
            if len(piece[0]):
                yield piece

    def _fit(self, pieces: Iterable[Columns]) -> tuple[int, int]:
        width = height = 1
        for _, x, y, _ in pieces:
            width, height = max(width, int(np.max(x)) + 1), max(height, int(np.max(y)) + 1)
        with self._named():
            return check_size((width, height))

    @contextmanager
    def _named(self) -> Iterator[None]:
        """What is wrong with the file is said with its name."""
        try:
            yield
        except UserError as error:
            raise UserError(f"'{self.path}' ({self.format}): {error}") from error


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
