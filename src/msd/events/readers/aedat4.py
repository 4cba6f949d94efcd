"""Reads AEDAT 4 (iniVation DV) through the `aedat` package (MIT, Rust): the first stream of events in the file.

The package panics on some damaged headers, and one such panic ends the process. So this module first checks the header
itself: a FlatBuffers table (compression, position of the index, text) whose text is XML.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

import numpy as np

from msd.errors import UserError
from msd.events.readers.file import File, damaged, library
from msd.events.recording import Source
from msd.events.stream import Columns

MAGIC = b"#!AER-DAT4.0\r\n"
HEADER_LIMIT = 1 << 20  # bytes
FIELDS = (4, 8, 4)  # bytes of compression, position of the index, and offset of the text in the table


def read(file: File) -> Source:
    """Reads the first stream of events."""
    library("aedat", "AEDAT 4")  # report a missing package before a damaged header
    _check_header(file)
    decoder = _open(file)
    streams = [(number, about) for number, about in decoder.id_to_stream().items() if about["type"] == "events"]
    if not streams:
        raise UserError("it has no stream of events; record or export one with events")
    number, about = min(streams, key=lambda stream: stream[0])
    return Source("aedat4", lambda chunk: _columns(file, number, chunk), (about["width"], about["height"]), "header")


def _check_header(file: File) -> None:
    """Raises UserError unless all offsets in the header's table lie in the header, and its text is XML in ASCII."""
    with file.path.open("rb") as stream:
        start = stream.read(len(MAGIC) + 4)
        length = int.from_bytes(start[len(MAGIC) :], "little")
        data = stream.read(min(length, HEADER_LIMIT))
    with damaged("its header cannot be read"):
        if not start.startswith(MAGIC) or len(start) < len(MAGIC) + 4 or len(data) < length or data[4:8] != b"IOHE":
            raise ValueError("it is truncated, or no AEDAT 4.0 header")
        (table,) = struct.unpack_from("<I", data)
        vtable = table - struct.unpack_from("<i", data, table)[0]
        if vtable < 0:
            raise ValueError("an offset points before it")
        size, table_size, *fields = struct.unpack_from("<5H", data, vtable)
        if size < 10 or not fields[2] or any(f and f + n > table_size for f, n in zip(fields, FIELDS, strict=True)):
            raise ValueError("its table is damaged")
        if table + table_size > length or (fields[0] and not 0 <= _number(data, table + fields[0]) <= 4):
            raise ValueError("its table is damaged")
        text = table + fields[2] + _number(data, table + fields[2])
        about = data[text + 4 : text + 4 + _number(data, text)]
        if len(about) != _number(data, text) or b"<!" in about:
            raise ValueError("its text is damaged")
        ElementTree.fromstring(about.decode("ascii"))


def _number(data: bytes, offset: int) -> int:
    return int(struct.unpack_from("<I", data, offset)[0])


def _open(file: File) -> Any:
    aedat = library("aedat", "AEDAT 4")
    with damaged("its header cannot be read"):
        return aedat.Decoder(str(file.path))


def _columns(file: File, number: int, chunk: int) -> Iterator[Columns]:
    """Yields chunks, each joined from packets of some thousand events."""
    packets = iter(_open(file))
    pending: list[Any] = []
    while True:
        with damaged("a packet cannot be read"):
            packet = next(packets, None)
        if packet is not None and packet["stream_id"] == number:
            pending.append(packet["events"])
        if pending and (packet is None or sum(map(len, pending)) >= chunk):
            events = np.concatenate(pending)
            pending = []
            yield events["t"], events["x"], events["y"], events["p"]
        if packet is None:
            return
