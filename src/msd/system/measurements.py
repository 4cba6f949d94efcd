"""Measurements of this machine, stored in the user's cache directory.

One that other processes disturbed is not stored; this process uses it for `RECENT` seconds, then measures again.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import platformdirs
import torch
from pydantic import TypeAdapter

from msd.errors import UserError
from msd.system import machine
from msd.system.files import write_whole

RECENT = 600.0
T = TypeVar("T")
_recent: dict[Path, tuple[float, object]] = {}  # by file: (when it was measured, the measurement)


def folder(name: str) -> Path:
    """The folder of one kind of measurement in the user's cache directory."""
    return Path(platformdirs.user_cache_dir("msd", appauthor=False)) / name


def cached(
    place: Path, key: tuple[object, ...], kind: type[T], valid: Callable[[T], bool], measure: Callable[[], T]
) -> T:
    """The measurement for `key`, from a file in the folder `place`, or measured and stored there.

    It depends on the processor, the number of threads and the versions of torch and transformers. A file that is
    damaged, or whose content is not a `kind` for which `valid` is true, is replaced. A folder that cannot be written to
    is ignored.
    """
    versions = torch.__version__, version("transformers")
    parts = (key, machine.hardware(), torch.backends.cpu.get_cpu_capability(), torch.get_num_threads(), versions)
    path = place / f"{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}.json"
    adapter = TypeAdapter(kind)
    with suppress(OSError, ValueError):
        stored: T = adapter.validate_json(path.read_bytes())
        if valid(stored):
            return stored
    since, recent = _recent.get(path, (-RECENT, None))
    if time.monotonic() - since < RECENT:
        return adapter.validate_python(recent)
    undisturbed, found = machine.quietly(measure)
    machine.return_freed_memory()  # of copies that only the measurement needed
    _recent.pop(path, None)
    if undisturbed:
        with suppress(OSError, UserError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, adapter.dump_json(found) + b"\n")
            return found
    _recent[path] = time.monotonic(), found
    return found
