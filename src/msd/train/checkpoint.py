"""The state of a training run on disk, the newest and the one before, so that one damaged file costs little."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msd.files import write_whole
from msd.records import LFS

FIELDS = {"params": dict, "optimizer": dict, "step": int, "schedule": dict, "running": dict}
SCHEDULE = {"steps", "start", "level", "warmup", "floor", "warm_from"}


class Damaged(Exception):  # noqa: N818
    """A checkpoint that cannot be gone on from; the message says which file it is, and why."""


def write(state: dict[str, Any], path: Path, previous: Path) -> None:
    """Writes `state`, of tensors and plain values, to `path`; what was there becomes `previous`.

    UserError when it cannot be written; the files are then as they were.
    """

    def put(beside: Path) -> None:
        try:
            torch.save(state, beside)
        except RuntimeError as error:  # of the library's own writer, which does not tell why
            raise OSError(errno.EIO, f"{str(error).splitlines()[0]} (is the disk full?)") from error

    write_whole(path, put, previous)


def read(path: Path) -> dict[str, Any]:
    """What `write` wrote, on the CPU. Damaged: no such file, cut short, anything else, or weights not finite."""
    if not path.is_file():
        raise Damaged(f"there is no '{path}'")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what bytes that are no checkpoint may raise has no bounds
        raise Damaged(f"'{path}' is damaged: {_reason(path, error)}") from error
    if not isinstance(state, dict) or not all(isinstance(state.get(name), kind) for name, kind in FIELDS.items()):
        raise Damaged(f"'{path}' is damaged: it is no checkpoint of a run")
    if state["schedule"].keys() != SCHEDULE:
        raise Damaged(f"'{path}' has a schedule of other fields; was it written by another version of msd?")
    moments = [value for each in state["optimizer"].get("state", {}).values() for value in each.values()]
    tensors = [*state["params"].values(), *state.get("averaged", {}).values(), *moments]
    if not all(bool(t.isfinite().all()) for t in tensors if isinstance(t, Tensor)):
        raise Damaged(f"'{path}' is damaged: its weights are not finite")
    return state


def _reason(path: Path, error: Exception) -> str:
    size = path.stat().st_size
    if size == 0:
        return "it is empty"
    with path.open("rb") as file:
        if file.read(len(LFS)) == LFS:
            return "it is a git-lfs pointer"
    return f"it is cut short, or no checkpoint ({(str(error).splitlines() or [''])[0][:100]})"
