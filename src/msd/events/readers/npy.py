"""`.npy`: a dict of arrays (as DSEC's samples and EventGPT have them), or a structured array, with t, x, y and p.

The file is mapped, not read: only the chunk that is asked for takes memory.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from msd.errors import UserError
from msd.events.readers import pickled
from msd.events.readers.dialect import columns_of, find
from msd.events.readers.file import File
from msd.events.recording import Source
from msd.events.stream import Columns

WANTED = "save t, x, y, p with numpy.savez(file, t=…, x=…, y=…, p=…)"
BROKEN = "the file is truncated or damaged: copy it again"


def read(file: File) -> Source:
    """The columns of the dict or of the structured array."""
    file.one_recording()
    table = _table(file)
    names = find(table if isinstance(table, dict) else table.dtype.names or ())
    if names is None:
        raise UserError(f"it has no columns t, x, y, p; {WANTED}")
    flat = {name: flattened(table[name]) for name in names}
    lengths = {len(column) for column in flat.values()}
    if len(lengths) != 1:
        raise UserError(f"its columns t, x, y, p are not four lists of one length; {WANTED}")
    count = lengths.pop()

    def columns(chunk: int) -> Iterator[Columns]:
        for start in range(0, count, chunk):
            yield columns_of({name: column[start : start + chunk] for name, column in flat.items()}, names)

    return Source("npy", columns, count=count)


def flattened(array: NDArray[Any]) -> NDArray[Any]:
    """[N] of an array with at most one axis longer than one; UserError for a table."""
    if max(array.shape, default=1) != array.size:
        raise UserError(f"its columns t, x, y, p are not four lists of one length; {WANTED}")
    return array.reshape(-1)


def header(stream: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """(shape, whether in Fortran's order, type) of the array that begins here; UserError for a broken header."""
    try:
        version = npy.read_magic(stream)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, kind = read(stream)
    except Exception as error:  # ValueError, SyntaxError, struct.error…, as the header is damaged
        raise UserError(f"its numpy header cannot be read; {BROKEN}") from error
    return shape, fortran, kind


def _table(file: File) -> Any:
    """A dict of arrays or a structured array, as views of the mapped file."""
    with file.path.open("rb") as stream:
        shape, _, kind = header(stream)
        offset = stream.tell()
        data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    if kind.hasobject:
        return pickled.load(data, offset)
    count = math.prod(shape)
    if max(shape, default=1) != count or kind.names is None:
        raise UserError(f"it is an array of shape {shape} and type {kind}, without names for t, x, y, p; {WANTED}")
    if len(data) - offset < count * kind.itemsize:
        raise UserError(f"it holds {len(data) - offset} of {count * kind.itemsize} bytes of its array; {BROKEN}")
    return np.frombuffer(data, kind, count, offset)
