"""Reads N-MNIST and N-Caltech101 `.bin`: events of 40 bits, x 8, y 8, p 1, t 23, most significant first.

An event with y = 240 is no event: it advances the clock of all later events by 2¹³ µs. Source: Orchard et al.,
"Converting Static Image Datasets to Spiking Neuromorphic Datasets Using Saccades", 2015, and its Matlab reader.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from msd.errors import UserError
from msd.events.readers.file import File
from msd.events.recording import Source
from msd.events.stream import Columns

EVENT = 5  # bytes
SIDE = 34  # pixels that N-MNIST uses of its sensor
CLOCK_ROW = 240
CLOCK_STEP = 1 << 13  # µs


def read(file: File) -> Source:
    """Reads N-MNIST, 34x34, or if any event is outside, N-Caltech101, whose size follows from its events."""
    length = file.path.stat().st_size
    if length % EVENT:
        raise UserError(f"{length} bytes are no whole number of events of {EVENT}; it is truncated or no N-MNIST file")
    small = all(((y < SIDE) | (y == CLOCK_ROW)).all() and (x < SIDE).all() for _, x, y, _ in _raw(file, 1 << 20))
    size, size_from = ((SIDE, SIDE), "format") if small else (None, "events")
    return Source("nmnist", lambda chunk: _columns(file, chunk), size, size_from)


def _columns(file: File, chunk: int) -> Iterator[Columns]:
    clock = 0
    for t, x, y, p in _raw(file, chunk):
        event = y != CLOCK_ROW
        clocks = clock + CLOCK_STEP * np.cumsum(~event)
        clock = int(clocks[-1])
        yield (t + clocks)[event], x[event], y[event], p[event]


def _raw(file: File, chunk: int) -> Iterator[Columns]:
    for data in file.words(0, f"({EVENT},)u1", chunk):
        t = (data[:, 2] & 0x7F).astype(np.int64) << 16 | data[:, 3].astype(np.int64) << 8 | data[:, 4]
        yield t, data[:, 0], data[:, 1], data[:, 2] >> 7
