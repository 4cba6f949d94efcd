"""The folder of an assembled reference model: complete, or not there at all; its manifest says what it was made of."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from msd.errors import UserError
from msd.reference import sources
from msd.reference.sources import fingerprint
from msd.system.files import FULL, write_whole


def main() -> None:
    """Bring `weights/checksums.json` up to date with the files beside it."""
    sums = sources.recorded()
    for name in ("encoder.safetensors", "vlm.safetensors"):
        sums[name] = sources.fingerprint(sources.WEIGHTS / name)
    write_whole(sources.CHECKSUMS, json.dumps(sums, indent=2) + "\n")


if __name__ == "__main__":
    main()


MANIFEST = "manifest.json"
INSTALL = "msd reference install --force"


def is_complete(folder: Path, full: bool = False) -> bool:
    """Whether every file of the manifest is there with its size; `full` also reads and compares the checksums."""
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
    """Make sure that `folder` is complete, building it if need be.

    Args:
        folder: final place; its parent is created.
        build: writes the files into the empty folder that it is given.
        needed_bytes: free space to insist on before building.
        full: read every file of an existing folder, instead of comparing sizes.
        force: build even if the folder is complete.

    Raises:
        UserError: the place cannot be written to or is full. Errors of `build` pass through. The folder is then as it
            was before, or absent if it was incomplete, and nothing else is left behind.
    """
    if not force and is_complete(folder, full):
        return
    with _disk_errors(folder.parent, needed_bytes):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            if not force and is_complete(folder, full):  # another process was faster
                return
            partial, old = folder.with_name(f"{folder.name}.partial"), folder.with_name(f"{folder.name}.old")
            for leftover in (partial, old):  # of a process that was killed: the lock says nobody is at work
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
    """Turn what a full or forbidden disk raises, also from inside safetensors, into one line."""
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
