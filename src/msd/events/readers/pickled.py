"""Parses the pickles that `numpy.save` writes for dicts and lists of arrays, without calling any function they name.

A pickle is a program: `pickle.load` runs it, with any function it names. This parser knows only the operations that
build plain containers and numpy arrays, and refuses all others. Arrays are views of the mapped file, so gigabytes of
events are not copied.
"""

from __future__ import annotations

import mmap
import pickletools
from dataclasses import dataclass
from typing import IO, Any, cast

import numpy as np

from msd.errors import UserError

MODULES = ("numpy", "numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric", "numpy._core.numeric")
OPERATIONS = {operation.code: operation for operation in pickletools.opcodes}
BYTES = {"SHORT_BINBYTES": 1, "BINBYTES": 4, "BINBYTES8": 8, "BYTEARRAY8": 8}  # opcode -> bytes of its length
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
VALUES = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "INT", "LONG", "FLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE"),
}
REMEDY = "save plain arrays with numpy.savez(file, t=…, x=…, y=…, p=…)"
REFUSAL = f"its pickle holds more than arrays in dicts and lists ({{}}), which could run code; {REMEDY}"


@dataclass(frozen=True)
class _Name:
    """A function or class that the pickle names; the name is compared, never resolved."""

    module: str
    name: str


class _Array:
    """An array under construction: `_reconstruct(ndarray, …)`; BUILD adds shape, type and bytes."""

    value: Any = None


class _Type:
    """A dtype under construction: its code; BUILD adds the byte order."""

    def __init__(self, code: str) -> None:
        self.code, self.order = code, "="

    def dtype(self) -> np.dtype[Any]:
        if self.code[:1] not in "biufO" or not self.code[1:].isdigit() or self.order not in "<>|=":
            raise UserError(REFUSAL.format(f"an array of type {self.order}{self.code}"))
        return np.dtype(object) if self.code[0] == "O" else np.dtype(self.order.replace("|", "") + self.code)


_MARK = object()


def load(data: mmap.mmap, offset: int) -> dict[str, Any]:
    """Returns the arrays, by name, of the dict that is pickled at `offset`, possibly within a list or an array.

    Arrays are read-only views of `data`. UserError if the pickle is broken, or holds anything but containers, numbers,
    strings and arrays.
    """
    try:
        return _table(_run(data, offset))
    except UserError:
        raise
    except Exception as error:  # a damaged program can cause anything: an empty stack, a short array, bad text
        raise UserError("its pickle is truncated or damaged; copy it again") from error


def _run(data: mmap.mmap, offset: int) -> Any:
    """Executes the operations up to STOP and returns the result."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    data.seek(offset)
    while True:
        operation = OPERATIONS[data.read(1).decode("latin-1")]
        name = operation.name
        if name in BYTES:
            length = int.from_bytes(data.read(BYTES[name]), "little")
            begin = data.tell()
            data.seek(begin + length)  # ValueError beyond the end
            stack.append(memoryview(data)[begin : begin + length])
            continue
        argument: Any = operation.arg.reader(cast(IO[bytes], data)) if operation.arg else None
        if name == "STOP":
            return stack.pop()
        if name in VALUES:
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name == "GLOBAL":
            stack.append(_Name(*argument.split(" ", 1)))
        elif name not in ("PROTO", "FRAME"):
            _build(name, stack)


def _build(name: str, stack: list[Any]) -> None:
    """Executes one operation that builds a container or an array from the top of the stack."""
    if name == "MARK":
        stack.append(_MARK)
    elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
        stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[name]())
    elif name == "TUPLE":
        stack.append(tuple(_to_mark(stack)))
    elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
        count = int(name[-1])
        stack[-count:] = [tuple(stack[-count:])]
    elif name in ("APPEND", "APPENDS"):
        items = _to_mark(stack) if name == "APPENDS" else [stack.pop()]
        _checked(stack[-1], list).extend(items)
    elif name in ("SETITEM", "SETITEMS"):
        items = _to_mark(stack) if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
        _checked(stack[-1], dict).update(zip(items[::2], items[1::2], strict=True))
    elif name == "STACK_GLOBAL":
        stack[-2:] = [_Name(stack[-2], stack[-1])]
    elif name == "REDUCE":
        arguments = stack.pop()
        stack.append(_called(stack.pop(), arguments))
    elif name == "BUILD":
        state = stack.pop()
        _set_state(stack[-1], state)
    else:
        raise UserError(REFUSAL.format(f"the operation {name}"))


def _called(function: Any, arguments: tuple[Any, ...]) -> Any:
    """Returns the result of a call, for the three functions that create arrays and dtypes."""
    if isinstance(function, _Name) and function.module in MODULES:
        if function.name == "_reconstruct":
            return _Array()
        if function.name == "dtype":
            return _Type(arguments[0])
        if function.name == "_frombuffer":
            data, kind, shape, order = arguments
            array = _Array()
            array.value = np.frombuffer(data, kind.dtype()).reshape(shape, order=order)
            return array
    name = f"{function.module}.{function.name}" if isinstance(function, _Name) else "a call"
    raise UserError(REFUSAL.format(name))


def _set_state(target: Any, state: tuple[Any, ...]) -> None:
    """Sets the shape, type and bytes of an array, or the byte order of a dtype."""
    if isinstance(target, _Type):
        target.order = state[1]
    elif isinstance(target, _Array):
        _, shape, kind, fortran, data = state
        if kind.dtype().hasobject:
            target.value = data  # a list of the elements
        else:
            target.value = np.frombuffer(data, kind.dtype()).reshape(shape, order="F" if fortran else "C")
    else:
        raise UserError(REFUSAL.format("the operation BUILD"))


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


def _to_mark(stack: list[Any]) -> list[Any]:
    """Removes the last mark and everything above it; returns the latter."""
    at = len(stack) - 1 - stack[::-1].index(_MARK)
    items = stack[at + 1 :]
    del stack[at:]
    return items


def _checked(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise UserError(REFUSAL.format(f"{type(value).__name__} where a {kind.__name__} should be"))
    return value
