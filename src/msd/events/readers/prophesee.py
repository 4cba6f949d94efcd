"""Reads Prophesee files: `.raw` (EVT 2.0, EVT 3.0) and `.dat` (versions 1 and 2).

The header has text lines that begin with "% "; binary words follow. Source: https://docs.prophesee.ai/stable/data/
(file formats, encoding formats).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msd.errors import UserError
from msd.events.readers.file import File
from msd.events.recording import Source
from msd.events.stream import Columns

HEADER_LIMIT = 1 << 16  # bytes
SENSORS = {  # part of the plugin or sensor name in the header -> (width, height)
    "genx320": (320, 320),
    "imx636": (1280, 720),
    "gen41": (1280, 720),
    "gen4": (1280, 720),
    "gen31": (640, 480),
    "gen3": (640, 480),
}
CD_EVENTS = (0x00, 0x0C)  # types in a `.dat` file with t, x, y, p: two-dimensional, and change detection
EVT2_TIME_HIGH = 8
EVT2_WRAP = 1 << 28
ADDR_Y, ADDR_X, BASE_X, VECT_12, VECT_8, TIME_LOW, TIME_HIGH = 0, 2, 3, 4, 5, 6, 8  # types of EVT 3.0 words
EVT3_WRAP = 1 << 12
EVT3_STEP = np.zeros(16, np.int64)  # by which each type of word advances the base x
EVT3_STEP[[VECT_12, VECT_8]] = 12, 8


def read(file: File) -> Source:
    """Reads EVT 2.0, EVT 3.0 or `.dat`, depending on the header."""
    lines, offset = _header_lines(file)
    header = _fields(lines)
    size, size_from = _size(header)
    evt = header.get("evt", "") or {"EVT2": "2.0", "EVT3": "3.0"}.get(header.get("format", "").split(";")[0], "")
    if not evt and ("Data file" in " ".join(lines) or file.extension == ".dat"):
        return _dat(file, header, offset, size, size_from)
    if header.get("endianness", "little") != "little":
        raise UserError(f"its words are {header['endianness']}-endian; convert it to little-endian")
    if evt in ("2", "2.0"):
        return Source("evt2", lambda chunk: _evt2(file.words(offset, "<u4", chunk)), size, size_from)
    if evt in ("3", "3.0"):
        return Source("evt3", lambda chunk: _evt3(file.words(offset, "<u2", chunk)), size, size_from)
    encoding = f"encoding '{evt}' is not supported" if evt else "header states no encoding"
    raise UserError(f"its {encoding}; convert it to EVT 2.0 or 3.0, for example with metavision tools")


def _header_lines(file: File) -> tuple[list[str], int]:
    """Returns (text of the header lines without their "% ", offset of the first byte after them)."""
    lines: list[str] = []
    with file.path.open("rb") as stream:
        offset = 0
        while (line := stream.readline(HEADER_LIMIT)).startswith(b"% ") and lines[-1:] != ["end"]:
            offset += len(line)
            if not line.endswith(b"\n") or offset > HEADER_LIMIT:
                raise UserError(f"the header does not end within {offset} bytes; the file is broken")
            lines.append(line[2:].decode("latin-1").strip())
    return lines, offset


def _fields(lines: list[str]) -> dict[str, str]:
    """Maps the first word of each header line to the rest; also the `key=value` parts of a `format` line."""
    fields = {key: value.strip() for key, _, value in (line.partition(" ") for line in lines)}
    parts = fields.get("format", "").split(";")[1:]
    return fields | {key.strip(): value.strip() for key, _, value in (part.partition("=") for part in parts)}


def _size(header: dict[str, str]) -> tuple[tuple[int, int] | None, str]:
    """Returns (sensor size, its origin) from the header."""
    text = header.get("geometry", "")
    for width, height in (("width", "height"), ("Width", "Height")):
        if width in header and height in header:
            text = f"{header[width]}x{header[height]}"
    if text:
        found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
        if not found:
            raise UserError(f"its header gives the sensor size as '{text[:40]}'; the file is broken")
        return (int(found[1]), int(found[2])), "header"
    names = " ".join(header.get(key, "") for key in ("plugin_name", "sensor_name", "sensor_generation")).lower()
    for word, size in SENSORS.items():
        if word in re.split(r"[\W_]+", names):
            return size, "sensor name"
    return None, "events"


def _dat(file: File, header: dict[str, str], offset: int, size: tuple[int, int] | None, size_from: str) -> Source:
    """Reads a `.dat`. The header is followed by the event type and the event size, one byte each, and the events.

    An event is uint32 t and uint32 address: x 14 bits, y 14 bits, p 1 bit in version 2; 9, 8 and 1 bits in version 1.
    The clock wraps after 2³² µs.
    """
    version = header.get("Version", "1")
    if version not in ("1", "2"):
        raise UserError(f"it is a .dat file of version '{version[:20]}'; only 1 and 2 are supported")
    with file.path.open("rb") as stream:
        stream.seek(offset)
        start = stream.read(2)
    if len(start) < 2:
        raise UserError("the file ends in its header; it is truncated: copy it again")
    if start[0] not in CD_EVENTS or start[1] != 8:
        raise UserError(
            f"its events have type {start[0]} and {start[1]} bytes; t, x, y, p events have type 0 or 12 and 8"
        )
    x_bits, y_bits = (14, 14) if version == "2" else (9, 8)

    def columns(chunk: int) -> Iterator[Columns]:
        last: int | None = None
        for words in file.words(offset + 2, "<u8", chunk):
            address = (words >> np.uint64(32)).astype(np.uint32)
            t = _unwrapped(words & 0xFFFFFFFF, last, 1 << 32)
            last = int(t[-1])
            x = address & ((1 << x_bits) - 1)
            y = address >> x_bits & ((1 << y_bits) - 1)
            yield t, x, y, address >> (x_bits + y_bits) & 1

    return Source(f"dat{version}", columns, size, size_from)


def _evt2(chunks: Iterator[NDArray[Any]]) -> Iterator[Columns]:
    """Decodes EVT 2.0 from words uint32 [N]."""
    last: int | None = None  # upper bits of the time, unwrapped
    for words in chunks:
        kind = words >> 28
        times = _unwrapped(words[kind == EVT2_TIME_HIGH] & 0xFFFFFFF, last, EVT2_WRAP)
        high = np.concatenate([[last or 0], times])
        rank = np.cumsum(kind == EVT2_TIME_HIGH)  # number of upper times up to each word
        event = kind <= 1
        if last is None:
            event &= rank > 0
        events = words[event]
        t = (high[rank[event]] << 6) | (events >> 22 & 0x3F)
        last = int(times[-1]) if len(times) else last
        yield t, events >> 11 & 0x7FF, events & 0x7FF, kind[event]


def _evt3(chunks: Iterator[NDArray[Any]]) -> Iterator[Columns]:
    """Decodes EVT 3.0 from words uint16 [N]."""
    high: int | None = None  # upper bits of the time, unwrapped
    time = row = base = 0  # base: polarity in bit 11, x in bits 0 to 10
    for words in chunks:
        kind, value = words >> 12, (words & 0xFFF).astype(np.int64)
        event = (kind == ADDR_X) | (kind == VECT_12) | (kind == VECT_8)
        if high is None:
            event &= np.cumsum(kind == TIME_HIGH) > 0
        t, high = _evt3_times(kind, value, time, high)
        rank = np.cumsum((kind == TIME_HIGH) | (kind == TIME_LOW))
        rows = np.concatenate([[row], value[kind == ADDR_Y] & 0x7FF])
        y = rows[np.cumsum(kind == ADDR_Y)]
        x, p, base = _evt3_bases(kind, value, base)
        time, row = int(t[-1]), int(rows[-1])

        single = kind[event] == ADDR_X
        bits = np.where(single, 1, np.where(kind[event] == VECT_8, value[event] & 0xFF, value[event]))
        x = np.where(single, value[event] & 0x7FF, x[event])
        p = np.where(single, value[event] >> 11, p[event])
        word, bit = np.nonzero(bits[:, None] >> np.arange(12) & 1)  # ordered by word, then by bit
        yield t[rank[event]][word], x[word] + bit, y[event][word], p[word]


def _evt3_times(
    kind: NDArray[Any], value: NDArray[np.int64], time: int, high: int | None
) -> tuple[NDArray[np.int64], int | None]:
    """Returns (the time at the start and after each time word, µs; the last upper time)."""
    is_high = kind == TIME_HIGH
    marks = is_high | (kind == TIME_LOW)
    highs = _unwrapped(value[is_high], high, EVT3_WRAP)
    upper = np.concatenate([[high or 0], highs])[np.cumsum(is_high[marks])]
    after = (upper << 12) | np.where(is_high[marks], 0, value[marks])
    return np.concatenate([[time], after]), int(highs[-1]) if len(highs) else high


def _evt3_bases(
    kind: NDArray[Any], value: NDArray[np.int64], base: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Returns (base x and polarity of each word, the last base). Base words set the base, vector words advance x."""
    is_base = kind == BASE_X
    moved = np.cumsum(EVT3_STEP[kind])
    set_to = np.concatenate([[base], value[is_base]])
    at = np.concatenate([[0], moved[is_base]])
    rank = np.cumsum(is_base)
    x = (set_to & 0x7FF)[rank] + moved - EVT3_STEP[kind] - at[rank]
    end = int((set_to[-1] & 0x7FF) + moved[-1] - at[-1])
    return x, set_to[rank] >> 11, (int(set_to[-1]) & 0x800) | (end & 0x7FF)


def _unwrapped(values: NDArray[Any], last: int | None, wrap: int) -> NDArray[np.int64]:
    """Unwraps a counter that restarts at `wrap`: a fall by more than half of `wrap` is a restart.

    last: the unwrapped value before the first one, if any.
    """
    values = values.astype(np.int64)
    if not len(values):
        return values
    before = int(values[0]) if last is None else last % wrap
    wraps = (0 if last is None else last // wrap) + np.cumsum(np.diff(values, prepend=before) < -(wrap // 2))
    return np.asarray(values + wraps * wrap, np.int64)
