"""Shared by readers: the file to read, blocks of its binary words, and optional libraries."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msd.errors import UserError

DAMAGED = "the file is truncated or damaged: copy it again"


@dataclass(frozen=True)
class File:
    """A path, the number of the recording to read from it, and the extension of its format, such as ".npz"."""

    path: Path
    recording: int = 0
    extension: str = ""

    def words(self, offset: int, dtype: str, count: int) -> Iterator[NDArray[Any]]:
        """Yields the file from a byte offset on, `count` words of `dtype` at a time.

        UserError if the file ends within a word.
        """
        width = np.dtype(dtype).itemsize
        with self.path.open("rb") as file:
            file.seek(offset)
            while block := file.read(count * width):
                complete = len(block) // width
                if complete:
                    yield np.frombuffer(block, dtype, complete)
                if len(block) % width:
                    raise UserError(
                        f"its last {len(block) % width} bytes are part of a word of {width}; "
                        "the file is truncated: copy it again"
                    )


@contextmanager
def damaged(problem: str) -> Iterator[None]:
    """Turns every error of a block that decodes a file into a UserError that states the problem.

    Parsers raise anything on damaged files. A panic of a Rust package is a `BaseException`.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{problem} ({str(error)[:160]}); {DAMAGED}") from error


def library(name: str, what: str) -> ModuleType:
    """Imports an optional library; if it is missing, UserError with the command that installs it."""
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(
            f"reading {what} needs the package '{name}'; install it with: pip install 'msd-decoding[events]'"
        ) from error
