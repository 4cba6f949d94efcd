"""What readers share: the file they are given, blocks of its bytes, and optional libraries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msd.errors import UserError

HEADER_LIMIT = 1 << 16


@dataclass(frozen=True)
class File:
    """A path, and which of several recordings in it is wanted."""

    path: Path
    recording: int = 0

    def one_recording(self) -> None:
        """UserError when another than the only recording is wanted."""
        if self.recording:
            raise UserError(f"there is no recording {self.recording}; this format holds one, number 0")

    def comment_header(self) -> tuple[list[str], int]:
        """(text of the lines at the start that begin with "% ", offset of the first byte after them)."""
        lines = []
        with self.path.open("rb") as file:
            offset = 0
            while (line := file.readline(HEADER_LIMIT)).startswith(b"% "):
                offset += len(line)
                if not line.endswith(b"\n") or offset > HEADER_LIMIT:
                    raise UserError(f"the header does not end within {offset} bytes; the file is broken")
                lines.append(line[2:].decode("latin-1").strip())
                if lines[-1] == "end":
                    break
        return lines, offset

    def words(self, offset: int, dtype: str, count: int) -> Iterator[NDArray[Any]]:
        """The file from a byte offset as an array, `count` items at a time; UserError if the last is not whole."""
        width = np.dtype(dtype).itemsize
        with self.path.open("rb") as file:
            file.seek(offset)
            while block := file.read(count * width):
                whole = len(block) // width
                if whole:
                    yield np.frombuffer(block, dtype, whole)
                if len(block) % width:
                    raise UserError(
                        f"the last {len(block) % width} of its bytes are part of a word of {width}; "
                        "the file is truncated: copy it again"
                    )


def library(name: str, what: str) -> ModuleType:
    """An optional library; UserError with what to install where it is missing."""
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(
            f"reading {what} needs the package '{name}'; install it with: pip install 'msd-decoding[events]'"
        ) from error
