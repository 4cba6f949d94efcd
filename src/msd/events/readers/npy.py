"""Reads `.npy`: a dict of arrays (DSEC's samples, EventGPT) or a structured array with t, x, y and p.

The file is mapped into memory, so only the current chunk is loaded.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy

from msd.errors import UserError
from msd.events.readers import pickled
from msd.events.readers.columns import common_length, event_columns, find_names
from msd.events.readers.file import DAMAGED, File, damaged
from msd.events.recording import Source
from msd.events.stream import Columns


def read(file: File) -> Source:
    """Reads the columns of the dict or of the structured array."""
    table = _table(file)
    names = find_names(table if isinstance(table, dict) else table.dtype.names or ())
    if names is None:
        raise UserError(f"it has no columns t, x, y, p; {pickled.REMEDY}")
    count = common_length([table[name].shape for name in names])
    flat = {name: table[name].reshape(-1) for name in names}

    def columns(chunk: int) -> Iterator[Columns]:
        for start in range(0, count, chunk):
            yield event_columns({name: column[start : start + chunk] for name, column in flat.items()}, names)

    return Source("npy", columns)


def header(stream: BinaryIO) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Reads the header of an array: (shape, type). UserError if it is broken."""
    with damaged("its numpy header cannot be read"):
        version = npy.read_magic(stream)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = read(stream)
    return shape, dtype


def _table(file: File) -> Any:
    """Returns a dict of arrays or a structured array, as views of the mapped file."""
    with file.path.open("rb") as stream:
        shape, dtype = header(stream)
        offset = stream.tell()
        data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    if dtype.hasobject:
        return pickled.load(data, offset)
    count = math.prod(shape)
    if max(shape, default=1) != count or dtype.names is None:
        raise UserError(
            f"it is an array of shape {shape} and type {dtype}, without names for t, x, y, p; {pickled.REMEDY}"
        )
    if len(data) - offset < count * dtype.itemsize:
        raise UserError(f"it holds {len(data) - offset} of {count * dtype.itemsize} bytes of its array; {DAMAGED}")
    return np.frombuffer(data, dtype, count, offset)
