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
from pathlib import Path

import numpy as np

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
