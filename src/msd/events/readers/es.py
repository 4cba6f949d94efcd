"""Event Stream `.es`, version 2, events of type DVS. Source: the sepia header library of the same format.

After the signature, three version bytes, the type, and width and height (uint16): an event is five bytes, of which the
first holds 7 bits of time since the event before and the polarity, the others x and y (uint16). A byte of 255 in the
first place is no event but 127 µs of waiting; 254 is nothing. The format counts y from the lower edge of the sensor;
here it is turned to count from the upper one, as everywhere in msd.events.
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

SIGNATURE = b"Event Stream"
HEADER = 20  # bytes of a header with width and height
TYPES = {0: "generic", 2: "ATIS", 4: "colour"}
DVS = 1
PAUSE = 254  # the least value of a first byte that begins no event
EVENT = 5  # bytes


def read(file: File) -> Source:
    """A stream of DVS events."""
    file.one_recording()
    with file.path.open("rb") as stream:
        header = stream.read(HEADER)
    if len(header) < 16 or (header[15] == DVS and len(header) < HEADER):
        raise UserError("the file ends in its header; it is truncated: copy it again")
    if header[12] != 2:
        raise UserError(f"it is of version {header[12]}.{header[13]}.{header[14]} of the format; version 2 is read")
    if header[15] != DVS:
        kind = TYPES.get(header[15], str(header[15]))
        raise UserError(f"its events are of type {kind}, which is not read; convert it to DVS events")
    width, height = int.from_bytes(header[16:18], "little"), int.from_bytes(header[18:20], "little")
    return Source("es", lambda chunk: _columns(file, height, chunk), (width, height), "header")


def _columns(file: File, height: int, chunk: int) -> Iterator[Columns]:
    time, rest = 0, np.empty(0, np.uint8)
    for block in file.words(HEADER, "u1", EVENT * chunk):
        data = np.concatenate([rest, block])
        pauses = _pauses(data)
        # without the pauses, events lie one after another
        plain = np.delete(data, pauses)
        count = len(plain) // EVENT
        events = plain[: count * EVENT].reshape(count, EVENT)
        starts = pauses - np.arange(len(pauses))  # where the pauses were, in the bytes without them
        rank = starts // EVENT  # events before each pause
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
    """Where the bytes that begin no event are, of bytes that begin with an event or a pause.

    Which bytes are first bytes depends on all before them, but only at the bytes that could be a pause: from one pause
    to the next, events follow in steps of five. So the walk goes from candidate to candidate of the same step.
    """
    candidates = np.flatnonzero(data >= PAUSE)
    by_step = [candidates[candidates % EVENT == step].tolist() for step in range(EVENT)]
    found: list[int] = []
    at = 0
    while True:
        line = by_step[at % EVENT]
        i = bisect_left(line, at)
        if i == len(line):
            return np.array(found, np.int64)
        found.append(line[i])
        at = line[i] + 1
