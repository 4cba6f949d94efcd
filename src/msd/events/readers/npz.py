"""`.npz`: arrays t, x, y and p, and perhaps `offsets`: recording i then is events offsets[i] to offsets[i + 1] - 1.

The members of the archive are unpacked side by side, a chunk at a time.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from msd.errors import UserError
from msd.events.readers import npy
from msd.events.readers.dialect import columns_of, find
from msd.events.readers.file import File
from msd.events.recording import Source
from msd.events.stream import Columns

SIZES = ("size", "sensor_size", "resolution")  # names of an array [width, height]
STEP = 1 << 20


def read(file: File) -> Source:
    """The wanted recording of the archive."""
    with _opened(file) as archive:
        members = {name.removesuffix(".npy"): name for name in archive.namelist()}
        names = find(members)
        if names is None:
            raise UserError(f"it has no arrays t, x, y, p; {npy.WANTED}")
        lengths = [_member(archive, members[name])[1] for name in names]
        if len(set(lengths)) != 1:
            raise UserError(f"its arrays t, x, y, p have lengths {', '.join(map(str, lengths))}; they must be equal")
        first, last = _range(file, archive, members, lengths[0])
        size = next((_small(archive, members[name]) for name in SIZES if name in members), None)
    if size is not None and len(size) != 2:
        raise UserError(f"its sensor size has {len(size)} numbers; give width and height")

    def columns(chunk: int) -> Iterator[Columns]:
        with _opened(file) as archive, ExitStack() as stack:
            streams = [_member(archive, members[name]) for name in names]
            for stream, _, kind in streams:
                stack.enter_context(stream)
                _skip(stream, first * kind.itemsize)
            for start in range(first, last, chunk):
                count = min(chunk, last - start)
                table = {n: _take(s, kind, count) for n, (s, _, kind) in zip(names, streams, strict=True)}
                yield columns_of(table, names)

    known = None if size is None else (int(size[0]), int(size[1]))
    return Source("npz", columns, known, "header" if known else "events", last - first)


def _range(file: File, archive: zipfile.ZipFile, members: dict[str, str], length: int) -> tuple[int, int]:
    """First event and the one after the last of the wanted recording."""
    if "offsets" not in members:
        file.one_recording()
        return 0, length
    offsets = _small(archive, members["offsets"]).astype(np.int64)
    if len(offsets) < 2 or offsets[0] < 0 or offsets[-1] > length or (np.diff(offsets) < 0).any():
        raise UserError("its offsets are not rising numbers of events; the file is damaged")
    if not 0 <= file.recording < len(offsets) - 1:
        raise UserError(f"there is no recording {file.recording}; it holds {len(offsets) - 1}, from number 0")
    return int(offsets[file.recording]), int(offsets[file.recording + 1])


def _member(archive: zipfile.ZipFile, name: str) -> tuple[IO[bytes], int, np.dtype[Any]]:
    """(stream after the header, length, type) of a list of numbers in the archive."""
    stream = archive.open(name)
    shape, _, kind = npy.header(stream)  # type: ignore[arg-type]
    count = math.prod(shape)
    if kind.hasobject or max(shape, default=1) != count:
        raise UserError(f"its array {name} has shape {shape} and type {kind}; it must be a list of numbers")
    return stream, count, kind


def _small(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    stream, length, kind = _member(archive, name)
    with stream:
        return _take(stream, kind, length)


def _take(stream: IO[bytes], kind: np.dtype[Any], count: int) -> NDArray[Any]:
    data = stream.read(count * kind.itemsize)
    if len(data) < count * kind.itemsize:
        raise UserError(f"an array ends early; {npy.BROKEN}")
    return np.frombuffer(data, kind)


def _skip(stream: IO[bytes], count: int) -> None:
    while count > 0 and (block := stream.read(min(count, STEP))):
        count -= len(block)


@contextmanager
def _opened(file: File) -> Iterator[zipfile.ZipFile]:
    """The archive; whatever zipfile says about a broken one becomes one line."""
    try:
        with zipfile.ZipFile(file.path) as archive:
            yield archive
    except UserError:
        raise
    except Exception as error:  # BadZipFile, zlib.error, EOFError, KeyError, NotImplementedError…
        raise UserError(f"it cannot be unpacked ({error}); {npy.BROKEN}") from error
