"""Reads Event Stream `.es`, version 2, events of type DVS. Source: the sepia header library of the same format.

The header is a signature, three version bytes, the type, and width and height (uint16). An event has five bytes: 7 bits
of time since the previous event and the polarity, then x and y (uint16). A first byte of 255 is no event but adds 127
µs to the clock; 254 has no meaning. The format counts y from the lower edge of the sensor; this module converts it to
count from the upper edge, as everywhere in msd.events.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from msd.errors import UserError
from msd.events.readers.file import File
from msd.events.recording import Source
from msd.events.stream import Columns

HEADER = 20  # bytes, with width and height
TYPES = {0: "generic", 2: "ATIS", 4: "colour"}
DVS = 1
PAUSE = 254  # the least first byte that begins no event
EVENT = 5  # bytes


def read(file: File) -> Source:
    """Reads a stream of DVS events."""
    with file.path.open("rb") as stream:
        header = stream.read(HEADER)
    if len(header) < 16 or (header[15] == DVS and len(header) < HEADER):
        raise UserError("the file ends in its header; it is truncated: copy it again")
    if header[12] != 2:
        raise UserError(f"it has format version {header[12]}.{header[13]}.{header[14]}; only version 2 is supported")
    if header[15] != DVS:
        kind = TYPES.get(header[15], str(header[15]))
        raise UserError(f"its events have the type {kind}, which is not supported; convert it to DVS events")
    width, height = int.from_bytes(header[16:18], "little"), int.from_bytes(header[18:20], "little")
    return Source("es", lambda chunk: _columns(file, height, chunk), (width, height), "header")


def _columns(file: File, height: int, chunk: int) -> Iterator[Columns]:
    time, rest = 0, np.empty(0, np.uint8)
    for block in file.words(HEADER, "u1", EVENT * chunk):
        data = np.concatenate([rest, block])
        pauses = _pauses(data)
        plain = np.delete(data, pauses)  # five bytes per event
        count = len(plain) // EVENT
        events = plain[: count * EVENT].reshape(count, EVENT)
        rank = (pauses - np.arange(len(pauses))) // EVENT  # events before each pause
        waits = np.zeros(count + 1, np.int64)
        np.add.at(waits, rank, 127 * (data[pauses] == 255))
        t = time + np.cumsum(waits[:count]) + np.cumsum(events[:, 0] >> 1, dtype=np.int64)
        time = int(t[-1] if count else time) + int(waits[count])
        rest = plain[count * EVENT :]
        x = events[:, 1] | events[:, 2].astype(np.uint16) << 8
        y = height - 1 - (events[:, 3] | events[:, 4].astype(np.int64) << 8)
        yield t, x, y, events[:, 0] & 1
    if len(rest):
        raise UserError(f"the last event has {len(rest)} of {EVENT} bytes; the file is truncated: copy it again")


def _pauses(data: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Returns the positions of pause bytes in data that begins with an event or a pause.

    A byte ≥ 254 is a pause only if it is a first byte, and that depends on all earlier pauses. Between two pauses first
    bytes are five bytes apart. So the loop jumps from each pause to the next candidate at such a distance.
    """
    candidates = np.flatnonzero(data >= PAUSE)
    by_remainder = [candidates[candidates % EVENT == remainder].tolist() for remainder in range(EVENT)]
    pauses: list[int] = []
    at = 0
    while True:
        same = by_remainder[at % EVENT]
        i = bisect_left(same, at)
        if i == len(same):
            return np.array(pauses, np.int64)
        pauses.append(same[i])
        at = same[i] + 1
