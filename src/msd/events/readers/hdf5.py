"""HDF5: DSEC's layout (`events/t, x, y, p` with `t_offset`), and others with the same four names, through `h5py`.

DSEC compresses with Blosc and Zstandard, which `hdf5plugin` brings. Source: https://dsec.ifi.uzh.ch/data-format/.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from msd.errors import UserError
from msd.events.readers.dialect import columns_of, find
from msd.events.readers.file import File, library
from msd.events.recording import Source
from msd.events.stream import Columns

GROUPS = ("events", "/", "CD/events", "davis/left/events", "prophesee/left")  # looked at first
DSEC_SIZE = (640, 480)


def read(file: File) -> Source:
    """The first of `GROUPS` that has events, or the only place that has. Times are those of `t` plus `t_offset`."""
    file.one_recording()
    with _opened(file) as root:
        place = _place(root)
        where = root[place]
        offset = next((_integer(g["t_offset"]) for g in (root, where) if _is_group(g) and "t_offset" in g), 0)
        columns = [where] if not _is_group(where) else [where[name] for name in find(_names(where)) or ()]
        lengths = [_length(column) for column in columns]
        if len(set(lengths)) != 1:
            raise UserError(f"its t, x, y and p have lengths {', '.join(map(str, lengths))}; they must be equal")
        size, size_from = _size(root, where)
    return Source("hdf5", lambda chunk: _columns(file, place, offset, lengths[0], chunk), size, size_from, lengths[0])


def _place(root: Any) -> str:
    """Where t, x, y and p are."""
    found = [place for place in GROUPS if place in root and find(_names(root[place])) is not None][:1]
    if not found:
        root.visititems(lambda name, item: found.append(name) if find(_names(item)) is not None else None)
    if not found:
        raise UserError(f"it has no t, x, y, p in {', '.join(GROUPS)} or another group; is it an event file?")
    if len(found) > 1:
        raise UserError(f"it has events in {', '.join(found[:4])}; put those that are wanted into a group 'events'")
    return found[0]


def _columns(file: File, place: str, offset: int, count: int, chunk: int) -> Iterator[Columns]:
    with _opened(file) as root:
        where = root[place]
        names = find(_names(where))
        assert names is not None
        for start in range(0, count, chunk):
            stop = min(start + chunk, count)
            table = {} if _is_group(where) else _part(where, start, stop)
            found = {name: _part(where[name], start, stop) for name in names} if _is_group(where) else table
            t, x, y, p = columns_of(found, names)
            yield (t if not offset else t.astype(np.int64) + offset), x, y, p


def _length(column: Any) -> int:
    """Numbers in a dataset of one axis longer than one, if any. UserError for a table."""
    if max(column.shape, default=1) != math.prod(column.shape):
        raise UserError(f"its event arrays have {len(column.shape)} axes; they must have one")
    return math.prod(column.shape)


def _part(column: Any, start: int, stop: int) -> Any:
    """Numbers `start` to `stop` - 1 of such a dataset, as [N]."""
    longest = max(range(len(column.shape)), key=lambda axis: column.shape[axis], default=None)
    wanted = (
        () if longest is None else tuple(slice(start, stop) if a == longest else 0 for a in range(len(column.shape)))
    )
    return np.asarray(column[wanted]).reshape(-1)


def _integer(value: Any) -> int:
    """A number that is stored as one, as an array of one, or as text."""
    numbers = np.asarray(value).reshape(-1)
    if len(numbers) != 1:
        raise UserError(f"it has {len(numbers)} numbers where there should be one; is it an event file?")
    return int(numbers[0])


def _is_group(where: Any) -> bool:
    return isinstance(where, Mapping)


def _names(where: Any) -> list[str]:
    """Names of the arrays in a group, or of the fields of a structured dataset."""
    if not _is_group(where):
        return list(where.dtype.names or ())
    found = []
    for name in where:
        with suppress(KeyError):  # a link that leads nowhere
            found += [] if _is_group(where[name]) else [name]
    return found


def _size(root: Any, where: Any) -> tuple[tuple[int, int] | None, str]:
    """(sensor size, where it is from): attributes, or that the layout is DSEC's."""
    for attributes in (where.attrs, root.attrs):
        if "width" in attributes and "height" in attributes:
            return (_integer(attributes["width"]), _integer(attributes["height"])), "header"
    if "ms_to_idx" in root and "t_offset" in root:
        return DSEC_SIZE, "format"
    return None, "events"


@contextmanager
def _opened(file: File) -> Iterator[Any]:
    """The file's root group; whatever h5py says about a broken file becomes one line."""
    h5py = library("h5py", "HDF5")
    with suppress(UserError):  # files without its filters are read all the same, others name the missing filter
        library("hdf5plugin", "compressed HDF5")
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
