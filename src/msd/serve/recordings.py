"""Reads recordings of event cameras in the helper process of `msd.serve.decoder`, within limits.

After the size of the sensor come the number of events (8 bytes) and their columns t (int64), x and y (uint16) and p
(uint8). The server validates them like events of any other source, and draws the frames itself.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from msd.errors import UserError
from msd.events import EventStream, open_chunks
from msd.events.readers import READERS, npy
from msd.events.stream import DTYPES, Columns
from msd.inputs.media import MOST_SECONDS

COUNT = struct.Struct(">Q")
MOST = 8_000_000  # events
FORMATS = ("", *(extension for reader in READERS for extension in reader.extensions))  # by number; "": by first bytes
DAMAGED = "it is truncated or damaged, or not of the format that the request names"
PICKLE = "it is a pickle, which is not read from a request; save it with numpy.savez(file, t=…, x=…, y=…, p=…)"


def packed(path: str, number: int) -> tuple[bytes, tuple[int, int]]:
    """Returns (what follows the size, the size) of a file. number: of its format in `FORMATS`.

    UserError, without the text of a library's exception: no recording of this format, too many events, or too long.
    """
    try:
        stream = _read(path, FORMATS[number])
    except UserError as error:
        raise UserError(_reason(error, path)) from error
    begin, end = stream.span
    if not len(stream):
        raise UserError("it holds no events; send a recording with events")
    if end - begin > MOST_SECONDS * 1e6:
        raise UserError(f"it is longer than {MOST_SECONDS:.0f} s; cut out the part that matters")
    return COUNT.pack(len(stream)) + b"".join(getattr(stream, name).tobytes() for name in DTYPES), stream.size


def _read(path: str, extension: str) -> EventStream:
    """Reads a file that has no pickle and at most `MOST` events; UserError for others."""
    with Path(path).open("rb") as file:
        if file.read(6) == b"\x93NUMPY":
            file.seek(0)
            if npy.header(file)[1].hasobject:
                raise UserError(PICKLE)
    recording = open_chunks(path, extension=extension)
    return replace(recording, source=replace(recording.source, columns=_limited(recording.source.columns))).read()


def _limited(columns: Callable[[int], Iterator[Columns]]) -> Callable[[int], Iterator[Columns]]:
    """Ends a reader after `MOST` events with a UserError."""

    def decoded(chunk: int) -> Iterator[Columns]:
        count = 0
        for part in columns(chunk):
            count += len(part[0])
            if count > MOST:
                raise UserError(f"more than {MOST // 10**6} million events; cut out the part that matters")
            yield part

    return decoded


def _reason(error: UserError, path: str) -> str:
    """The message of an error without the path before it; another message if it repeats that of a library's exception.

    Raises the `MemoryError` that caused the error.
    """
    cause: BaseException = error
    while isinstance(cause, UserError) and cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, MemoryError):
        raise cause
    if isinstance(cause, ImportError):
        return "this server lacks a package that reads this format; send it as .npz"
    return re.sub(rf"^'{re.escape(path)}'( \(\w+\))?: ", "", str(error)) if isinstance(cause, UserError) else DAMAGED
