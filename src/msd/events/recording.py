"""`Recording`: an event file of any format, read in bounded chunks; and the division of events into frames.

A reader returns a `Source`: what the header states, and a function that decodes the file from the start, chunk by
chunk. Memory holds one chunk of about a million events (13 MB; some 100 MB while decoding), so files may be of any
length. Code that needs the total count or time span first iterates twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from msd.errors import UserError, named
from msd.events.stream import Columns, EventStream, check_size, join, unchecked, validated

CHUNK = 1_000_000  # events
MAX_FRAMES = 10_000
MAX_PIXELS = 250_000_000  # of all layers of a representation together


@dataclass(frozen=True)
class Source:
    """What a reader knows about a file.

    Attributes:
        format: the name of the format, such as "evt3".
        columns: decodes the file from its start; takes a number of events and yields chunks of about that many.
        size: (width, height) of the sensor, if the file or its format states it.
        size_from: origin of the size: "header", "sensor name", "format" or "events".
    """

    format: str
    columns: Callable[[int], Iterator[Columns]]
    size: tuple[int, int] | None = None
    size_from: str = "events"


@dataclass(frozen=True, eq=False)
class Recording:
    """An event file. Each iteration decodes it from its start.

    Chunks are `EventStream`s that follow each other in time and are not empty. A UserError that names the file is
    raised where the file is broken, after all chunks before that place.
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
        """(width, height): the given size, else the file's own, else the smallest that holds all events (reads it)."""
        return self._known_size() or self._bounding_size(self._decoded())

    @property
    def size_from(self) -> str:
        """Origin of the size: "given", "header", "sensor name", "format" or "events"."""
        return "given" if self.given_size is not None else self.source.size_from

    def __iter__(self) -> Iterator[EventStream]:
        size, last = self.size, None
        for columns in self._decoded():
            with self._naming_file():
                t, x, y, p = validated(columns, size)
                if last is not None and t[0] < last:
                    raise UserError(f"times go back from {last} to {t[0]} µs; order the events by time")
            last = t[-1]
            yield unchecked(t, x, y, p, size)

    def read(self) -> EventStream:
        """Returns all events, 13 bytes each; decodes the file once, even if its events determine the sensor size."""
        decoded = list(self._decoded())
        size = self._known_size() or self._bounding_size(decoded)
        with self._naming_file():
            return join([unchecked(*validated(columns, size), size) for columns in decoded], size)

    def _known_size(self) -> tuple[int, int] | None:
        with self._naming_file():
            return check_size(self.given_size) if self.given_size is not None else self.source.size

    def _decoded(self) -> Iterator[Columns]:
        """Yields decoded chunks that are not empty."""
        chunks = self.source.columns(self.chunk)
        while True:
            with self._naming_file():
                columns = next(chunks, None)
            if columns is None:
                return
            if len(columns[0]):
                yield columns

    def _bounding_size(self, decoded: Iterable[Columns]) -> tuple[int, int]:
        width = height = 1
        for _, x, y, _ in decoded:
            width, height = max(width, int(np.max(x)) + 1), max(height, int(np.max(y)) + 1)
        with self._naming_file():
            return check_size((width, height))

    def _naming_file(self) -> AbstractContextManager[None]:
        """Puts the file's name in front of UserErrors."""
        return named(f"'{self.path}' ({self.format})")


Events: TypeAlias = EventStream | Recording
By: TypeAlias = Literal["count", "time"]


@dataclass(frozen=True)
class Extent:
    """The number of events, and the times of the first and the last one, µs."""

    events: int
    begin: int
    end: int


def extent(events: Events) -> Extent:
    """Returns the extent of a stream, or of a recording, which is read once."""
    count, begin, end = 0, 0, 0
    for chunk in chunks(events):
        begin = begin if count else chunk.span[0]
        count, end = count + len(chunk), chunk.span[1]
    return Extent(count, begin, end)


def chunks(events: Events) -> Iterator[EventStream]:
    """Yields the chunks of a recording, or a stream as one chunk; none are empty."""
    return (chunk for chunk in ((events,) if isinstance(events, EventStream) else events) if len(chunk))


def edges(whole: Extent, count: int, by: By) -> NDArray[np.int64]:
    """Returns the [count + 1] edges of frames: event numbers if by "count", times in µs if by "time".

    By count, every frame has events // count events and the last also has the remainder, as in EventGPT. By time, all
    frames are equally long to within a microsecond, and the last includes the last event.
    """
    if by not in ("count", "time"):
        raise UserError(f"frames by '{by}'; choose 'count' (equally many events) or 'time' (equally long)")
    if not 1 <= count <= MAX_FRAMES:
        raise UserError(f"{count} frames; ask for 1 to {MAX_FRAMES}")
    numbers = np.arange(count + 1, dtype=np.int64)
    if by == "time":
        return whole.begin + numbers * (whole.end + 1 - whole.begin) // count
    by_count = numbers * (whole.events // count)
    by_count[-1] = whole.events
    return by_count


def frame_chunks(events: Events, frame_edges: NDArray[np.int64], by: By) -> Iterator[tuple[int, EventStream]]:
    """Yields (frame number, some events of that frame) in order, for the edges that `edges` returns."""
    passed = 0
    for chunk in chunks(events):
        if by == "count":
            places = np.clip(frame_edges - passed, 0, len(chunk))
        else:
            places = np.searchsorted(chunk.t, frame_edges)
        for frame, (first, last) in enumerate(pairwise(places)):
            if last > first:
                yield frame, chunk.part(int(first), int(last))
        passed += len(chunk)


def check_memory(layers: int, size: tuple[int, int]) -> None:
    """Raises UserError for a representation of gigabytes: a damaged header may state any sensor size."""
    if layers * size[0] * size[1] > MAX_PIXELS:
        raise UserError(
            f"{layers} layers of {size[0]}x{size[1]} are more than {MAX_PIXELS // 10**6} million pixels; "
            "ask for fewer, or check the sensor size"
        )
