"""Reads the pickles that `numpy.save` writes for dicts and lists of arrays, without calling any function they name.

A pickle is a program: `pickle.load` runs it, with any function it names. Here the names of numpy's constructors of
arrays and dtypes give classes of this module, and every other name is refused. Arrays are views of the mapped file, so
gigabytes of events are not copied.
"""

from __future__ import annotations

import mmap
import pickle
from typing import Any, cast

import numpy as np

from msd.errors import UserError
from msd.events.readers.file import damaged

MODULES = ("numpy", "numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric", "numpy._core.numeric")
LEAST_VIEW = 1024  # bytes; shorter reads are copied
REMEDY = "save plain arrays with numpy.savez(file, t=…, x=…, y=…, p=…)"
REFUSAL = f"its pickle holds more than arrays in dicts and lists ({{}}), which could run code; {REMEDY}"


def load(data: mmap.mmap, offset: int) -> dict[str, Any]:
    """Returns the arrays, by name, of the dict that is pickled at `offset`, possibly within a list or an array.

    Arrays are read-only views of `data`. UserError if the pickle is broken, or names other functions and classes.
    """
    data.seek(offset)
    with damaged("its pickle cannot be read"):
        return _table(_Unpickler(_Views(data)).load())


class _Type:
    """A dtype: its code from the call, its byte order from the state."""

    def __init__(self, code: str, *flags: object) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]

    def dtype(self) -> np.dtype[Any]:
        if self.code[:1] not in "biufO" or not self.code[1:].isdigit() or self.order not in "<>|=":
            raise UserError(REFUSAL.format(f"an array of type {self.order}{self.code}"))
        return np.dtype(object) if self.code[0] == "O" else np.dtype(self.order.replace("|", "") + self.code)


class _Array:
    """An array: `_frombuffer(data, dtype, shape, order)`, or `_reconstruct(class, shape, code)` and then a state."""

    def __init__(self, *arguments: Any) -> None:
        self.value = self._view(*arguments) if len(arguments) == 4 else None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran, data = state
        self.value = self._view(data, kind, shape, "F" if fortran else "C")

    def _view(self, data: Any, kind: _Type, shape: tuple[int, ...], order: Any) -> Any:
        """Returns the array; of an object array the list of its elements."""
        dtype = kind.dtype()
        return data if dtype.hasobject else np.frombuffer(data, dtype).reshape(shape, order=order)


NAMES = {"_reconstruct": _Array, "_frombuffer": _Array, "ndarray": _Array, "dtype": _Type}


class _Views:
    """The mapped file, with views instead of copies for long reads. ValueError beyond the end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.readline = data, data.readline

    def read(self, count: int) -> bytes:
        if count < LEAST_VIEW:
            return self.data.read(count)
        begin = self.data.tell()
        self.data.seek(begin + count)
        return cast(bytes, memoryview(self.data)[begin : begin + count])


class _Unpickler(pickle._Unpickler):  # the one in Python: the one in C copies, and trusts lengths in the file
    dispatch = pickle._Unpickler.dispatch | {
        pickle.BYTEARRAY8[0]: pickle._Unpickler.dispatch[pickle.BINBYTES8[0]],  # a view, too
    }

    def find_class(self, module: str, name: str) -> Any:
        if module not in MODULES or name not in NAMES:
            raise UserError(REFUSAL.format(f"{module}.{name}"))
        return NAMES[name]


def _table(value: Any) -> dict[str, Any]:
    """Returns the arrays of a dict by name; the dict may be the only element of nested lists or arrays."""
    for _ in range(8):
        if isinstance(value, _Array) and isinstance(value.value, list):
            value = value.value
        elif isinstance(value, list | tuple) and len(value) == 1:
            value = value[0]
    if not isinstance(value, dict):
        raise UserError(f"its pickle is no dict of arrays; {REMEDY}")
    arrays = {str(key): item.value for key, item in value.items() if isinstance(item, _Array)}
    return {name: array for name, array in arrays.items() if isinstance(array, np.ndarray)}
