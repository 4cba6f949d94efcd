"""Readers of event files, one module per format family. `open_chunks` chooses by first bytes or extension.

A reader is a module with a function `read(file: File) -> Source` and one line in `READERS`. No reader executes anything
that a file contains.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from msd.errors import UserError, named
from msd.events.readers.file import File
from msd.events.recording import CHUNK, Recording, Source
from msd.events.stream import EventStream
from msd.system.files import open_regular


@dataclass(frozen=True)
class Reader:
    """A format family: its module in this package, its extensions, and the first bytes of its files, if fixed."""

    module: str
    extensions: tuple[str, ...]
    magic: bytes = b""


SEVERAL = "npz"  # the format whose files may hold several recordings
READERS = (
    Reader("npy", (".npy",), b"\x93NUMPY"),
    Reader(SEVERAL, (".npz",), b"PK\x03\x04"),
    Reader("hdf5", (".h5", ".hdf5"), b"\x89HDF\r\n\x1a\n"),
    Reader("aedat4", (".aedat4",), b"#!AER-DAT4"),
    Reader("es", (".es",), b"Event Stream"),
    Reader("prophesee", (".raw", ".dat"), b"% "),
    Reader("nmnist", (".bin",)),
    Reader("text", (".csv", ".txt")),
)
"""A text file may start with "% " too, so text is recognised by its extension."""


def open_chunks(
    path: str | os.PathLike[str],
    chunk: int = CHUNK,
    size: tuple[int, int] | None = None,
    recording: int = 0,
    extension: str | None = None,
) -> Recording:
    """Opens an event file of any known format, to be read in chunks.

    Args:
        path: the file. Formats: docs/events.md.
        chunk: events per chunk, about. It bounds the memory.
        size: (width, height) of the sensor, for files that do not state it or state it wrongly.
        recording: number of the recording in a file with several (an `.npz` with `offsets`).
        extension: of the format, such as ".npz", for a file whose name does not have it.

    Raises:
        UserError: no such file, an unknown format, a missing library, a broken header. Damage further on is raised when
            it is reached.
    """
    if chunk < 1:
        raise UserError(f"chunks of {chunk} events; give at least 1")
    path = Path(path)
    extension = path.suffix.lower() if extension is None else extension
    reader = _reader_of(path, extension)
    with named(f"'{path}'"):
        if recording and reader.module != SEVERAL:
            raise UserError(f"there is no recording {recording}; this format holds one, number 0")
        read: Callable[[File], Source] = import_module(f"msd.events.readers.{reader.module}").read
        return Recording(path, read(File(path, recording, extension)), chunk, size)


def read(path: str | os.PathLike[str], size: tuple[int, int] | None = None, recording: int = 0) -> EventStream:
    """Reads all events of a file, 13 bytes each. Arguments and errors as in `open_chunks`."""
    return open_chunks(path, size=size, recording=recording).read()


def _reader_of(path: Path, extension: str) -> Reader:
    """Chooses the reader by extension, or by first bytes if these contradict it; UserError if none fits."""
    with open_regular(path, f"'{path}'", "event file") as file:
        start = file.read(16)
    if not start:
        raise UserError(f"'{path}' is empty (0 bytes); give an event file")
    by_extension = next((r for r in READERS if extension in r.extensions), None)
    if by_extension is not None and (not by_extension.magic or start.startswith(by_extension.magic)):
        return by_extension
    by_magic = next((r for r in READERS if r.magic and start.startswith(r.magic)), None)
    if by_magic is not None:
        return by_magic
    if by_extension is not None:
        raise UserError(f"'{path}' does not begin as a {extension} file does; it is broken, or has the wrong name")
    known = ", ".join(e for r in READERS for e in r.extensions)
    raise UserError(f"'{path}' is not an event file: neither its name nor its first bytes are known; known: {known}")
