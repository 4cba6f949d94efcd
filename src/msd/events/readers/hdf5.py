"""Reads HDF5: DSEC's layout (`events/t, x, y, p` with `t_offset`), and others with these four names, through `h5py`.

DSEC compresses with Blosc and Zstandard, which `hdf5plugin` provides. Source: https://dsec.ifi.uzh.ch/data-format/.
HDF5 files can refer to any other file of the machine; such references are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from msd.errors import UserError
from msd.events.readers.columns import common_length, event_columns, find_names
from msd.events.readers.file import File, damaged, library
from msd.events.recording import Source
from msd.events.stream import Columns

GROUPS = ("events", "/", "CD/events", "davis/left/events", "prophesee/left")  # searched first
DSEC_SIZE = (640, 480)
ELSEWHERE = "it refers to other files; copy all data into one file, for example with h5repack"
MISSING = ("not available", "plugin", "not registered")  # in messages about filters


def read(file: File) -> Source:
    """Reads the first of `GROUPS` that has events, or the only other place that has; adds `t_offset` to the times."""
    with _opened(file) as root:
        place = _place(root)
        where = root[place]
        offset = next((_offset(g["t_offset"]) for g in (root, where) if _is_group(g) and "t_offset" in g), 0)
        columns = [where] if not _is_group(where) else [where[name] for name in find_names(_names(where)) or ()]
        _check_own(*columns)
        count = common_length([column.shape for column in columns])
        size, size_from = _size(root, where)
    return Source("hdf5", lambda chunk: _columns(file, place, offset, count, chunk), size, size_from)


def _place(root: Any) -> str:
    """Returns the path of the group or structured dataset with t, x, y and p."""
    found = [place for place in GROUPS if place in root and find_names(_names(root[place])) is not None][:1]
    if not found:
        root.visititems(lambda name, item: found.append(name) if find_names(_names(item)) is not None else None)
    if not found:
        raise UserError(f"it has no t, x, y, p in {', '.join(GROUPS)} or another group; is it an event file?")
    if len(found) > 1:
        raise UserError(f"it has events in {', '.join(found[:4])}; move the ones to read into a group 'events'")
    return found[0]


def _columns(file: File, place: str, offset: int, count: int, chunk: int) -> Iterator[Columns]:
    with _opened(file) as root:
        where = root[place]
        names = find_names(_names(where))
        assert names is not None
        for start in range(0, count, chunk):
            stop = min(start + chunk, count)
            table = {n: _part(where[n], start, stop) for n in names} if _is_group(where) else _part(where, start, stop)
            t, x, y, p = event_columns(table, names)
            yield (t if not offset else t.astype(np.int64) + offset), x, y, p


def _part(dataset: Any, start: int, stop: int) -> Any:
    """Returns elements `start` to `stop` - 1 of a dataset with at most one axis longer than one, as [N]."""
    axes = range(len(dataset.shape))
    longest = max(axes, key=lambda axis: dataset.shape[axis], default=None)
    index = tuple(slice(start, stop) if axis == longest else 0 for axis in axes)
    return np.asarray(dataset[index]).reshape(-1)


def _offset(dataset: Any) -> int:
    """Returns DSEC's `t_offset`, µs."""
    _check_own(dataset)
    return _integer(dataset)


def _check_own(*datasets: Any) -> None:
    """Raises UserError for a dataset whose values are in another file."""
    if any(dataset.external or dataset.is_virtual for dataset in datasets):
        raise UserError(ELSEWHERE)


def _check_links(root: Any, external: int) -> None:
    """Raises UserError for a link to another file. external: the type of such links; no type of own links is above."""
    found: list[bytes] = []
    root.id.links.visit(lambda name, link: found.append(name) if link.type >= external else None, info=True)
    if found:
        raise UserError(ELSEWHERE)


def _integer(value: Any) -> int:
    """Returns a number that is stored as a scalar, as an array of one element, or as text; else ValueError."""
    return int(np.asarray(value).item())


def _is_group(where: Any) -> bool:
    return isinstance(where, Mapping)


def _names(where: Any) -> list[str]:
    """Returns the names of the datasets in a group, or of the fields of a structured dataset."""
    if not _is_group(where):
        return list(where.dtype.names or ())
    names = []
    for name in where:
        with suppress(KeyError):  # a dangling link
            names += [] if _is_group(where[name]) else [name]
    return names


def _size(root: Any, where: Any) -> tuple[tuple[int, int] | None, str]:
    """Returns (sensor size, its origin): from attributes, or because the layout is DSEC's."""
    for attributes in (where.attrs, root.attrs):
        if "width" in attributes and "height" in attributes:
            return (_integer(attributes["width"]), _integer(attributes["height"])), "header"
    if "ms_to_idx" in root and "t_offset" in root:
        return DSEC_SIZE, "format"
    return None, "events"


@contextmanager
def _opened(file: File) -> Iterator[Any]:
    """Opens the file's root group; turns every error of h5py into a UserError.

    HDF5 itself opens no file that has been unlinked, so it gets an open one.
    """
    h5py = library("h5py", "HDF5")
    with suppress(UserError):  # only compressed files need the filters; the error below names a missing one
        library("hdf5plugin", "compressed HDF5")
    with damaged("HDF5 cannot read it"), file.path.open("rb") as stream, h5py.File(stream, "r") as root:
        _check_links(root, h5py.h5l.TYPE_EXTERNAL)
        try:
            yield root
        except OSError as error:
            if "filter" in str(error) and any(text in str(error) for text in MISSING):
                raise UserError(
                    f"it is compressed with a filter that is not installed ({str(error)[:160]}); install the filters "
                    "with: pip install 'msd-decoding[events]'"
                ) from error
            raise
