"""Reads `.npz`: arrays t, x, y and p. With an array `offsets`, recording i is events offsets[i] to offsets[i + 1] - 1.

The members of the archive are unpacked in parallel, one chunk at a time.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from msd.errors import UserError
from msd.events.readers import npy, pickled
from msd.events.readers.columns import common_length, event_columns, find_names
from msd.events.readers.file import DAMAGED, File, damaged
from msd.events.recording import Source
from msd.events.stream import Columns

SIZES = ("size", "sensor_size", "resolution")  # names of an array [width, height]
PROBLEM = "it cannot be unpacked"


def read(file: File) -> Source:
    """Reads one recording of the archive."""
    with damaged(PROBLEM), zipfile.ZipFile(file.path) as archive:
        members = {name.removesuffix(".npy"): name for name in archive.namelist()}
        names = find_names(members)
        if names is None:
            raise UserError(f"it has no arrays t, x, y, p; {pickled.REMEDY}")
        count = common_length([(_member(archive, members[name])[1],) for name in names])
        first, last = _range(file, archive, members, count)
        size = next((_whole(archive, members[name]) for name in SIZES if name in members), None)
    if size is not None and len(size) != 2:
        raise UserError(f"its sensor size has {len(size)} numbers; give width and height")

    def columns(chunk: int) -> Iterator[Columns]:
        with damaged(PROBLEM), zipfile.ZipFile(file.path) as archive, ExitStack() as stack:
            streams = [_member(archive, members[name]) for name in names]
            for stream, _, dtype in streams:
                stack.enter_context(stream)
                stream.seek(first * dtype.itemsize, io.SEEK_CUR)
            for start in range(first, last, chunk):
                count = min(chunk, last - start)
                table = {n: _next(s, dtype, count) for n, (s, _, dtype) in zip(names, streams, strict=True)}
                yield event_columns(table, names)

    known = None if size is None else (int(size[0]), int(size[1]))
    return Source("npz", columns, known, "header" if known else "events")


def _range(file: File, archive: zipfile.ZipFile, members: dict[str, str], length: int) -> tuple[int, int]:
    """Returns the first event of the recording and the one after its last."""
    offsets = np.array([0, length])
    if "offsets" in members:
        offsets = _whole(archive, members["offsets"]).astype(np.int64)
    if len(offsets) < 2 or offsets[0] < 0 or offsets[-1] > length or (np.diff(offsets) < 0).any():
        raise UserError("its offsets are not rising numbers of events; the file is damaged")
    if not 0 <= file.recording < len(offsets) - 1:
        raise UserError(f"there is no recording {file.recording}; it holds {len(offsets) - 1}, from number 0")
    return int(offsets[file.recording]), int(offsets[file.recording + 1])


def _member(archive: zipfile.ZipFile, name: str) -> tuple[IO[bytes], int, np.dtype[Any]]:
    """Opens a one-dimensional array of numbers: (stream after the header, length, type)."""
    stream = archive.open(name)
    shape, dtype = npy.header(stream)  # type: ignore[arg-type]
    if dtype.hasobject:
        raise UserError(f"its array {name} has type {dtype}; give numbers")
    return stream, common_length([shape]), dtype


def _whole(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    stream, length, dtype = _member(archive, name)
    with stream:
        return _next(stream, dtype, length)


def _next(stream: IO[bytes], dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    data = stream.read(count * dtype.itemsize)
    if len(data) < count * dtype.itemsize:
        raise UserError(f"an array ends early; {DAMAGED}")
    return np.frombuffer(data, dtype)
