"""Reads Prophesee files: `.raw` (EVT 2.0, EVT 3.0) and `.dat` (versions 1 and 2).

The files hold a header of text lines that begin with "% ", then binary words. Source:
https://docs.prophesee.ai/stable/data/ (file formats, encoding formats).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from msd.errors import UserError
from msd.events.readers.evt import Evt2, Evt3, unwrap_clock
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
CD_EVENTS = (0x00, 0x0C)
"""Types of a `.dat` file that hold t, x, y, p: two-dimensional events, and change detection events."""


def read(file: File) -> Source:
    """Reads EVT 2.0, EVT 3.0 or `.dat`, depending on the header."""
    lines, offset = _header_lines(file)
    header = _fields(lines)
    size, size_from = _size(header)
    evt = header.get("evt", "") or {"EVT2": "2.0", "EVT3": "3.0"}.get(header.get("format", "").split(";")[0], "")
    if not evt and ("Data file" in " ".join(lines) or file.path.suffix.lower() == ".dat"):
        return _dat(file, header, offset, size, size_from)
    if header.get("endianness", "little") != "little":
        raise UserError(f"its words are {header['endianness']}-endian; convert it to little-endian")
    for version, decoder, word in (("2", Evt2, "<u4"), ("3", Evt3, "<u2")):
        if evt in (version, f"{version}.0"):
            return Source(
                f"evt{version}",
                lambda chunk, decoder=decoder, word=word: _decode(file, offset, word, decoder(), chunk),  # type: ignore[misc]
                size,
                size_from,
            )
    encoding = f"encoding '{evt}' is not supported" if evt else "header states no encoding"
    raise UserError(f"its {encoding}; convert it to EVT 2.0 or 3.0, for example with metavision tools")


def _decode(file: File, offset: int, word: str, decoder: Evt2 | Evt3, chunk: int) -> Iterator[Columns]:
    for words in file.words(offset, word, chunk):
        yield decoder(words)


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
    fields = {}
    for line in lines:
        key, _, value = line.partition(" ")
        fields[key] = value.strip()
    for part in fields.get("format", "").split(";")[1:]:
        key, _, value = part.partition("=")
        fields[key.strip()] = value.strip()
    return fields


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
            t = unwrap_clock(words & 0xFFFFFFFF, last, 1 << 32)
            last = int(t[-1])
            x = address & ((1 << x_bits) - 1)
            y = address >> x_bits & ((1 << y_bits) - 1)
            yield t, x, y, address >> (x_bits + y_bits) & 1

    count = (file.path.stat().st_size - offset - 2) // 8
    return Source(f"dat{version}", columns, size, size_from, count)
