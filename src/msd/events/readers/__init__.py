"""Event files: `open_chunks` finds the reader by the file's first bytes or its extension. One file per format family.

A reader is a function from a `File` to a `Source` (msd.events.recording), and one line in `READERS`. Nothing in a file
is ever executed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from msd.errors import UserError
from msd.events.readers.file import File
from msd.events.recording import CHUNK, Recording, Source
from msd.events.stream import EventStream
from msd.system.files import open_regular


@dataclass(frozen=True)
class Reader:
    """A format family: its module below this one, the extensions it owns, and the first bytes of its files, if any."""

    module: str
    extensions: tuple[str, ...]
    magic: bytes = b""


READERS = (
    Reader("npy", (".npy",), b"\x93NUMPY"),
    Reader("npz", (".npz",), b"PK\x03\x04"),
    Reader("hdf5", (".h5", ".hdf5"), b"\x89HDF\r\n\x1a\n"),
    Reader("aedat4", (".aedat4",), b"#!AER-DAT4"),
    Reader("es", (".es",), b"Event Stream"),
    Reader("prophesee", (".raw", ".dat"), b"% "),
    Reader("nmnist", (".bin",)),
    Reader("text", (".csv", ".txt")),
)
"""In this order: first by magic, then by extension. A text file may start with "% " too, so text goes by extension."""


def open_chunks(
    path: str | os.PathLike[str], chunk: int = CHUNK, size: tuple[int, int] | None = None, recording: int = 0
) -> Recording:
    """An event file of any known format, to be read in chunks of about `chunk` events.

    Args:
        path: the file. Formats: docs/events.md.
        chunk: events per chunk. Memory is bounded by it.
        size: (width, height) of the sensor, for files that do not tell it or tell it wrongly.
        recording: which one, of a file that holds several (an `.npz` with `offsets`).

    Raises:
        UserError: no such file, an unknown format, a missing library, a broken header. What is wrong further on is
            raised when it is reached.
    """
    if chunk < 1:
        raise UserError(f"chunks of {chunk} events; give at least 1")
    path = Path(path)
    reader = _reader_of(path)
    try:
        read: Callable[[File], Source] = import_module(f"msd.events.readers.{reader.module}").read
        source = read(File(path, recording))
    except UserError as error:
        raise UserError(f"'{path}': {error}") from error
    return Recording(path, source, chunk, size)


def read(path: str | os.PathLike[str], size: tuple[int, int] | None = None, recording: int = 0) -> EventStream:
    """All events of a file, as `open_chunks` reads them: 13 bytes of memory each."""
    return open_chunks(path, size=size, recording=recording).read()


def _reader_of(path: Path) -> Reader:
    """By extension, unless the first bytes say something else; UserError for what no reader owns."""
    with open_regular(path, f"'{path}'", "event file") as file:
        start = file.read(16)
    if not start:
        raise UserError(f"'{path}' is empty (0 bytes); give an event file")
    extension = path.suffix.lower()
    owner = next((r for r in READERS if extension in r.extensions), None)
    if owner is not None and (not owner.magic or start.startswith(owner.magic)):
        return owner
    found = next((r for r in READERS if r.magic and start.startswith(r.magic)), None)
    if found is not None:
        return found
    if owner is not None:
        raise UserError(f"'{path}' does not begin as a {extension} file does; it is broken, or named wrongly")
    known = ", ".join(e for r in READERS for e in r.extensions)
    raise UserError(f"'{path}' is not an event file that is known by its name or its first bytes; known: {known}")
