"""HDF5: DSEC's layout (`events/t, x, y, p` with `t_offset`), and others with the same four names, through `h5py`.

DSEC compresses with Blosc and Zstandard, which `hdf5plugin` brings. Source: https://dsec.ifi.uzh.ch/data-format/.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from msd.errors import UserError
from msd.events.readers.file import File, library
from msd.events.readers.names import columns_of, find
from msd.events.recording import Source
from msd.events.stream import Columns

GROUPS = ("events", "/", "CD/events", "davis/left/events", "prophesee/left")
DSEC_SIZE = (640, 480)


def read(file: File) -> Source:
    """The first of `GROUPS` that has events. Times are those of `t` plus `t_offset`."""
    file.one_recording()
    with _opened(file) as root:
        place = next((place for place in GROUPS if place in root and find(_names(root[place])) is not None), None)
        if place is None:
            raise UserError(f"it has no t, x, y, p in {', '.join(GROUPS)}; is it an event file?")
        where = root[place]
        offset = int(root["t_offset"][()]) if "t_offset" in root else 0
        first = where if not _is_group(where) else where[(find(where) or "x")[0]]
        if first.ndim != 1:
            raise UserError(f"its event arrays have {first.ndim} axes; they must have one")
        size, size_from = _size(root, where)
        count = len(first)
    return Source("hdf5", lambda chunk: _columns(file, place, offset, count, chunk), size, size_from, count)


def _columns(file: File, place: str, offset: int, count: int, chunk: int) -> Iterator[Columns]:
    with _opened(file) as root:
        where = root[place]
        names = find(_names(where))
        assert names is not None
        for start in range(0, count, chunk):
            part = slice(start, start + chunk)
            found = where[part] if not _is_group(where) else {name: where[name][part] for name in names}
            t, x, y, p = columns_of(found, names)
            yield t + np.int64(offset), x, y, p


def _is_group(where: Any) -> bool:
    return isinstance(where, Mapping)


def _names(where: Any) -> list[str]:
    """Names of the arrays in a group, or of the fields of a structured dataset."""
    return list(where) if _is_group(where) else list(where.dtype.names or ())


def _size(root: Any, where: Any) -> tuple[tuple[int, int] | None, str]:
    """(sensor size, where it is from): attributes, or that the layout is DSEC's."""
    for attributes in (where.attrs, root.attrs):
        if "width" in attributes and "height" in attributes:
            return (int(attributes["width"]), int(attributes["height"])), "header"
    if "ms_to_idx" in root and "t_offset" in root:
        return DSEC_SIZE, "format"
    return None, "events"


@contextmanager
def _opened(file: File) -> Iterator[Any]:
    """The file's root group; whatever h5py says about a broken file becomes one line."""
    h5py = library("h5py", "HDF5")
    with suppress(UserError):  # files without filters are read all the same; h5py names a missing one otherwise
        library("hdf5plugin", "compressed HDF5")  # registers its filters
    try:
        with h5py.File(file.path, "r") as root:
            yield root
    except UserError:
        raise
    except Exception as error:  # OSError, KeyError, RuntimeError, ValueError…, as h5py meets the damage
        text = str(error)
        if "filter" in text and ("not available" in text or "plugin" in text or "not registered" in text):
            raise UserError(
                f"it is compressed with a filter that is missing here ({text[:160]}); install the filters with: "
                "pip install 'msd-decoding[events]'"
            ) from error
        raise UserError(
            f"HDF5 cannot read it ({text[:160]}); the file is truncated or damaged: copy it again"
        ) from error
